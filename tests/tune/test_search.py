"""Search and rungs over the records: what a start decides is what it would have decided before."""

import math
import signal
import sys
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.tune.experiment.trial import Trial
from test_space import LOG, sweep

from mlvicx_dist.errors import DataError
from mlvicx_dist.tune.book import Book
from mlvicx_dist.tune.plan import grace
from mlvicx_dist.tune.records import Look, Records, best
from mlvicx_dist.tune.runner import Stop
from mlvicx_dist.tune.search import PointSearch, Rungs
from mlvicx_dist.tune.space import open_space
from mlvicx_dist.tune.table import Table, shown

TOTAL = 90


class Bench:
    """Search, rungs and book as a start of the sweep has them, with Tune's part played by hand."""

    def __init__(self, folder, config=None, first=()):
        self.config = config or sweep({"loss.lambda_local": LOG, "loss.local.variance": LOG})
        self.records = Records.read(folder)
        self.stop = Stop([])
        table = Table(self.records, trials=9, total=TOTAL)
        self.book = Book(self.records, table, self.stop, total=TOTAL)
        self.search = PointSearch(
            open_space(self.config),
            self.config.search,
            self.book,
            first=first,
            given=lambda record: {"number": record.number, "point": record.point},
        )
        self.rungs = Rungs(self.book, total=TOTAL, grace_steps=10, reduction=3)
        self.trials = {}

    def begin(self):
        name = f"tune-{len(self.trials)}"
        given = self.search.suggest(name)
        trial = SimpleNamespace(trial_id=name, config=given)
        self.trials[given["number"]] = trial
        self.rungs.on_trial_add(None, trial)
        return given

    def look(self, number, step, target, **more):
        """As Tune does with a result; whether the trial goes on."""
        trial = self.trials[number]
        result = {"step": step, "target": target, "trained_s": 1.0, "looked_s": 0.1, **more}
        decision = self.rungs.on_trial_result(None, trial, result)
        if decision != "STOP":
            self.search.on_trial_result(trial.trial_id, result)
        self.book.on_trial_result(0, [], trial, result)
        if decision == "STOP" or step == TOTAL:
            self.end(number)
        return decision != "STOP"

    def end(self, number, error=False):
        trial = self.trials[number]
        self.search.on_trial_complete(trial.trial_id, {}, error=error)
        self.book.on_trial_complete(0, [], trial)


def test_rungs_after_a_restart_are_those_of_before(tmp_path):
    """Eight trials, the driver dying after the fourth: the same ones go on as without a death."""
    targets = [0.5, 0.7, 0.6, 0.8, 0.55, 0.75, 0.9, 0.65]

    def run(bench, numbers):
        passed = []
        for number in numbers:
            assert bench.begin()["number"] == number
            if bench.look(number, 10, targets[number]) and bench.look(number, 30, targets[number]):
                bench.look(number, TOTAL, targets[number])
                passed.append(number)
        return passed

    whole = run(Bench(tmp_path / "whole"), range(8))
    cut = run(Bench(tmp_path / "cut"), range(4)) + run(Bench(tmp_path / "cut"), range(4, 8))
    assert cut == whole == [0, 1, 3, 5, 6]
    assert best(Records.read(tmp_path / "cut").all()).number == 6


def test_a_trial_that_goes_on_is_on_the_rung_that_it_reached(tmp_path):
    bench = Bench(tmp_path)
    bench.begin()
    assert bench.look(0, 10, 0.9)
    again = Bench(tmp_path)
    assert again.begin()["number"] == 0
    again.begin()
    # Against 0.9 at the first rung, which this start has not seen itself.
    assert not again.look(1, 10, 0.8)


@pytest.mark.parametrize("by", ["random", "optuna"])
def test_points_depend_on_seed_and_number_alone(tmp_path, by):
    config = sweep({"loss.lambda_local": LOG}, search={"by": by, "seed": 3})
    whole = Bench(tmp_path / "whole", config)
    expected = [whole.begin()["point"] for _ in range(4)]
    assert len({str(point) for point in expected}) == 4
    first = Bench(tmp_path / "cut", config)
    began = [first.begin()["point"] for _ in range(2)]
    second = Bench(tmp_path / "cut", config)
    # What did not end comes first, with the point that it had.
    assert [second.begin()["point"] for _ in range(2)] == began == expected[:2]
    if by == "random":
        assert [second.begin()["point"] for _ in range(2)] == expected[2:]


def test_optuna_learns_from_earlier_starts(tmp_path):
    config = sweep({"loss.lambda_local": LOG}, search={"by": "optuna"})
    bench = Bench(tmp_path, config)
    bench.rungs = SimpleNamespace(
        on_trial_add=lambda *a: None, on_trial_result=lambda *a: "CONTINUE"
    )
    for number in range(12):
        value = bench.begin()["point"]["loss.lambda_local"]
        bench.look(number, TOTAL, -abs(math.log10(value) - 0.5))
    late = Bench(tmp_path, config)
    draws = [math.log10(late.begin()["point"]["loss.lambda_local"]) for _ in range(8)]
    # Uniform draws of [-1, 1] would lie 0.625 from 0.5 on average.
    assert sum(abs(draw - 0.5) for draw in draws) / 8 < 0.45


def test_first_points_are_tried_first(tmp_path):
    bench = Bench(tmp_path, first=[{"loss.lambda_local": 2.0, "loss.local.variance": 3.0}])
    assert bench.begin()["point"] == {"loss.lambda_local": 2.0, "loss.local.variance": 3.0}
    assert bench.begin()["point"] != {"loss.lambda_local": 2.0, "loss.local.variance": 3.0}


def test_how_trials_end(tmp_path):
    bench = Bench(tmp_path)
    for _ in range(6):
        bench.begin()
    bench.look(0, TOTAL, 0.8)
    bench.look(1, 10, 0.9)
    bench.look(2, 10, math.nan, state="diverged", cause="step 9: the loss is nan.")
    bench.end(2)
    bench.end(4, error=True)
    (tmp_path / "error").write_bytes(cloudpickle.dumps(OSError("gone")))
    assert hasattr(Trial, "pickled_error_file")
    bench.book.on_trial_error(
        0, [], SimpleNamespace(config={"number": 4}, pickled_error_file=tmp_path / "error")
    )
    bench.look(5, 10, 0.95)
    bench.end(5)
    bench.look(3, 10, 0.95)
    bench.stop.asked.append(signal.SIGTERM)
    bench.end(3)
    records = Records.read(tmp_path)
    states = {record.number: record.state for record in records.all()}
    # Trial 3 was only interrupted, trial 5 ended without a word.
    assert states.pop(5) == "failed" and "without a look" in records.by_number[5].cause
    assert states == {0: "finished", 1: "running", 2: "diverged", 3: "running", 4: "failed"}
    assert (
        records.by_number[2].cause == "step 9: the loss is nan." and not records.by_number[2].looks
    )
    assert records.by_number[4].cause == "gone"
    again = Bench(tmp_path)
    # What diverged is not tried again; what failed is, since its cause may be mended.
    assert [again.begin()["number"] for _ in range(5)] == [1, 3, 4, 5, 6]


def test_no_rung_stops_a_trial_at_its_last_step(tmp_path):
    """Its process would be killed before its encoder is saved."""
    bench = Bench(tmp_path)
    bench.rungs = Rungs(bench.book, total=TOTAL, grace_steps=TOTAL, reduction=3)
    for number, target in enumerate([0.9, 0.8, 0.7]):
        bench.begin()
        assert bench.look(number, TOTAL, target)
    assert [record.state for record in bench.records.all()] == ["finished"] * 3


def test_a_record_that_cannot_be_written_stops_the_sweep_and_no_trial_fails(tmp_path):
    bench = Bench(tmp_path / "sweep")
    bench.begin()
    assert not bench.stop.stop_all()
    (tmp_path / "sweep" / "0000" / "trial.json").unlink()
    (tmp_path / "sweep" / "0000").rmdir()
    (tmp_path / "sweep" / "0000").touch()
    bench.look(0, 10, 0.5)
    assert bench.stop.stop_all()
    assert "what is known of trial 0000 cannot be written" in str(bench.stop.error)
    assert bench.records.by_number[0].reached == 10


def test_what_tune_pickles_can_be_pickled_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bench = Bench(tmp_path)
    with shown(bench.records, trials=9, total=TOTAL) as table:
        assert type(table) is not Table
        bench.book = Book(bench.records, table, bench.stop, total=TOTAL)
        cloudpickle.dumps(bench.book)
        bench.book.begin(0, {"loss.lambda_local": 1.0})
        table.look(bench.records.by_number[0])


def test_a_step_that_was_done_again_counts_once(tmp_path):
    bench = Bench(tmp_path)
    bench.begin()
    for step, target in ((10, 0.1), (20, 0.2), (10, 0.3)):
        bench.book.on_trial_result(
            0, [], bench.trials[0], {"step": step, "target": target, "trained_s": 1, "looked_s": 0}
        )
    looks = Records.read(tmp_path).by_number[0].looks
    assert [(look.step, look.target) for look in looks] == [(10, 0.3), (20, 0.2)]
    assert isinstance(looks[0], Look)


def test_a_damaged_record_is_named(tmp_path):
    Bench(tmp_path).begin()
    (tmp_path / "0000" / "trial.json").write_text("{")
    with pytest.raises(DataError, match=r"0000/trial.json: the record of a trial is damaged"):
        Records.read(tmp_path)


@pytest.mark.parametrize(
    ("total", "warmup", "every", "wanted", "expected"),
    [
        (900, 50, 20, None, 100),
        (900, 125, 20, None, 260),
        (900, 0, 20, 30, 40),
        (50, 0, 20, 99, 50),
    ],
)
def test_the_first_rung_is_at_a_look_after_the_warm_up(total, warmup, every, wanted, expected):
    assert grace(total, warmup, every, wanted) == expected
