"""Equal images and equal time: whose schedule ends when."""

import errno
import json

import pytest
from small import small_tree

from mlvicx_dist.config import PretrainConfig, Train, parse_config, to_tree
from mlvicx_dist.errors import DataError, DivergenceError
from mlvicx_dist.evaluate import budget
from mlvicx_dist.evaluate.budget import Rate, equal_time, measured, seconds_a_step
from mlvicx_dist.evaluate.methods import methods_of
from mlvicx_dist.storage import place
from mlvicx_dist.train.launch import Outcome
from mlvicx_dist.train.optim import FINAL_SHARE, learning_rate


@pytest.fixture
def methods():
    """By name; `mlvicx` is the reference."""
    tree = {
        "kind": "compare",
        "name": "t",
        "pretrain": {"data": {"shards": [{"path": "x"}]}, **small_tree()},
        "methods": {"mlvicx": {}, "vicreg": {}, "simclr": {}},
        "tasks": [{"name": "one", "data": {"shards": ["y"]}}],
    }
    return {method.name: method for method in methods_of(parse_config(tree, "t"))}


@pytest.fixture
def machine(monkeypatch):
    """Seconds of a step of each method on a machine that trains nothing; None: it diverges."""
    seconds, ran = {}, []

    def pretrain(config):
        name = config.run.name.removesuffix("-seed-0")
        ran.append(name)
        if seconds[name] is None:
            raise DivergenceError("step 1: the sum of the loss value is nan; start again.")
        return Outcome(place(config.run.storage_path) / config.run.name, 24)

    monkeypatch.setattr(budget, "pretrain", pretrain)
    monkeypatch.setattr(budget, "read_rows", lambda path: [])
    monkeypatch.setattr(budget, "seconds_a_step", lambda rows, batch: seconds[ran[-1]])
    return seconds, ran


def test_a_method_is_measured_beside_the_reference(methods, machine, tmp_path):
    """A method that is added when the machine is half as fast gets no fewer steps."""
    seconds, ran = machine
    seconds |= {"mlvicx": 0.3, "vicreg": 0.2}
    reference, vicreg, simclr = (methods[name] for name in ("mlvicx", "vicreg", "simclr"))
    first = measured(tmp_path, [reference, vicreg], reference, 0)
    assert equal_time(1000, first.rates) == {"mlvicx": 1000, "vicreg": 1500}
    seconds |= {"mlvicx": 0.6, "vicreg": 0.4, "simclr": 0.4}
    later = measured(tmp_path, [reference, vicreg, simclr], reference, 0)
    assert ran == ["mlvicx", "vicreg", "mlvicx", "simclr"]
    assert equal_time(1000, later.rates) == {"mlvicx": 1000, "vicreg": 1500, "simclr": 1500}
    # All are known: none is measured.
    assert measured(tmp_path, [simclr], reference, 0).rates == {"simclr": Rate(0.4, 0.6)}
    assert len(ran) == 4


def test_a_run_that_measures_is_seen_by_nobody(methods):
    config = methods["mlvicx"].at(0, "x", 24)
    tree = to_tree(config)
    tree["run"] |= {"track": {"mlflow": "http://localhost"}, "samples_path": "samples"}
    short = budget._short(PretrainConfig.model_validate(tree))
    assert (short.run.track.mlflow, short.run.samples_path) == (None, None)


def test_what_diverges_while_it_is_measured_is_left_out(methods, machine, tmp_path):
    seconds, _ = machine
    seconds |= {"mlvicx": 0.3, "vicreg": None, "simclr": 0.1}
    found = measured(tmp_path, [*methods.values()], methods["mlvicx"], 0)
    assert list(found.rates) == ["mlvicx", "simclr"] and "step 1" in found.diverged["vicreg"]
    with pytest.raises(DivergenceError, match="the reference diverged") as caught:
        measured(tmp_path, [*methods.values()], methods["vicreg"], 0)
    assert str(caught.value).startswith("methods.vicreg: ")
    assert str(caught.value).endswith("another name.") and "\n" not in str(caught.value)


def test_rates_that_cannot_be_kept_or_read_are_one_sentence(
    methods, machine, tmp_path, monkeypatch
):
    machine[0]["mlvicx"] = 0.3

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    reference = methods["mlvicx"]
    with monkeypatch.context() as patched, pytest.raises(DataError, match="set storage_path to"):
        patched.setattr(budget, "write_whole", full)
        measured(tmp_path, [reference], reference, 0)
    (tmp_path / "rates.json").write_text(json.dumps({"mlvicx": 0.3}))
    with pytest.raises(DataError, match="the measured rates are damaged"):
        measured(tmp_path, [reference], reference, 0)


def test_steps_times_seconds_is_the_references_time():
    seconds = {"mlvicx": 0.3, "vicreg": 0.2, "slow": 0.7, "glacial": 1e4}
    steps = equal_time(1000, {name: Rate(s, 0.3) for name, s in seconds.items()})
    assert steps == {"mlvicx": 1000, "vicreg": 1500, "slow": 428, "glacial": 1}
    for name in ("mlvicx", "vicreg", "slow"):
        # Less than one step is left over.
        assert 0 <= 1000 * 0.3 - steps[name] * seconds[name] + 1e-9 < seconds[name] + 1e-9


def test_a_rate_is_the_median_without_the_first_rows():
    rows = [{"images_per_s": rate} for rate in (1.0, 2.0, 10.0, 20.0, 40.0)]
    assert seconds_a_step(rows, 60) == pytest.approx(3.0)


def test_the_schedule_ends_with_the_steps():
    """Whatever their number is, no matter of whole epochs."""
    train = Train(epochs=5, steps=37, batch_size=256, warmup_epochs=0.5)
    rates = [learning_rate(step, settings=train, steps_per_epoch=10) for step in range(38)]
    assert max(rates) == rates[5] == pytest.approx(train.learning_rate_per_256)
    assert rates[37] == pytest.approx(FINAL_SHARE * train.learning_rate_per_256)
    whole = Train(epochs=5, batch_size=256, warmup_epochs=0.5)
    assert learning_rate(37, settings=whole, steps_per_epoch=10) > 10 * rates[37]
