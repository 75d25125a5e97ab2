"""Comparisons from their settings to their page: what is done, done once, refused, and shown."""

import io
import json
import os
import re

import numpy as np
import pytest
import torch
import yaml
from small import small_tree

from mlvicx_dist.cli import main
from mlvicx_dist.config import EvaluateConfig, Task, parse_config, to_tree
from mlvicx_dist.errors import DataError, DivergenceError
from mlvicx_dist.evaluate import budget, compare, compare_plan
from mlvicx_dist.evaluate.compare_table import markdown
from mlvicx_dist.evaluate.comparison import found, opened, scores_path, write_diverged
from mlvicx_dist.evaluate.evaluation import evaluate_checkpoint
from mlvicx_dist.evaluate.methods import methods_of
from mlvicx_dist.evaluate.task import (
    Scores,
    images_of,
    plane,
    read_images,
    read_scores,
    write_images,
    write_scores,
)
from mlvicx_dist.model.encoder import untrained
from mlvicx_dist.session import ray_session
from mlvicx_dist.storage import make_folder, place, write_whole
from mlvicx_dist.train.launch import Outcome
from mlvicx_dist.train.owner import only_driver
from mlvicx_dist.train.weights import load_encoder


def tree(shards, folder, **changes):
    """Two methods beside both floors, two seeds, four steps each."""
    settings = {
        "kind": "compare",
        "name": "small",
        "storage_path": str(folder),
        "pretrain": {
            "data": {"shards": [{"path": str(shards)}], "loader_workers": 0},
            **small_tree(),
            "train": {
                "batch_size": 8,
                "epochs": 1,
                "optimizer": "adamw",
                "learning_rate_per_256": 1e-3,
                "warmup_epochs": 0.2,
                "log_every_steps": 1,
            },
            "checkpoint": {"keep": 1},
        },
        "methods": {"mlvicx": {}, "vicreg": {}, "untrained": {}, "pixels": {}},
        "seeds": [0, 1],
        "tasks": [
            {
                "name": "phantoms",
                "data": {"shards": [str(shards)], "loader_workers": 0},
                "bootstrap": {"draws": 100},
                "probe": {"l2": [0.1], "max_iterations": 30},
                "few_labels": {"fractions": [0.5]},
            }
        ],
    }
    return settings | changes


def written(folder, settings):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def compared(capsys, path, *more):
    """What `mlvicx compare` says of itself, its exit code, and its words."""
    capsys.readouterr()
    code = main(["compare", str(path), "--json", *more])
    out, err = capsys.readouterr()
    return (json.loads(out) if out else None), code, err


@pytest.fixture
def alone(monkeypatch):
    """Runs are trained in this process, without Ray; answers with the names of those that were."""
    from mlvicx_dist.train.loop import train
    from mlvicx_dist.train.notices import NoNotices
    from mlvicx_dist.train.step import Member

    trained = []

    def pretrain(config):
        run_dir = place(config.run.storage_path) / config.run.name
        trained.append(config.run.name)
        if config.train.learning_rate_per_256 > 1e20:
            raise DivergenceError("step 1: the sum of the loss value is nan; start again.")
        make_folder(run_dir)
        member = Member(0, 1, torch.device("cpu"))
        steps = train(config, run_dir, member, report=lambda row: None, notices=NoNotices())
        write_whole(run_dir / "config.yaml", yaml.safe_dump(to_tree(config)).encode())
        return Outcome(run_dir, steps)

    monkeypatch.setattr(compare, "pretrain", pretrain)
    monkeypatch.setattr(budget, "pretrain", pretrain)
    monkeypatch.setattr(compare, "_connect", lambda plan, stack: None)
    return trained


@pytest.mark.slow
def test_all_is_done_once_and_shown(alone, phantom_shards, tmp_path, capsys):
    path = written(tmp_path, tree(phantom_shards, tmp_path / "c", seeds=[0]))
    document, code, _ = compared(capsys, path)
    folder = tmp_path / "c" / "small"
    assert (code, document["missing"], alone) == (0, {}, ["mlvicx-seed-0", "vicreg-seed-0"])
    task = document["tasks"]["phantoms"]
    assert list(task["auroc"]) == ["mlvicx", "vicreg", "untrained", "pixels"]
    assert list(task["difference"]["auroc"]) == ["vicreg", "untrained", "pixels"]
    assert task["over_best"]["baseline"] in ("vicreg", "untrained", "pixels")
    assert {"view AP", "view PA"} <= task["subgroups"].keys()
    runs = document["methods"]["mlvicx"]["runs"]["0"]
    assert runs["images"] == 8 * runs["steps"] > 0
    assert document["methods"]["vicreg"]["runs"]["0"]["images"] == runs["images"]
    # An encoder is left, what only going on would need is not.
    assert list((folder / "runs" / "mlvicx-seed-0" / "exports").glob("*/encoder.safetensors"))
    assert not (folder / "runs" / "mlvicx-seed-0" / "checkpoints").exists()

    # Again: nothing is trained or judged. One score less: that one is judged anew, and no more.
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("scores/*/*.npz")}
    assert len(stamps) == 4
    again, _, err = compared(capsys, path)
    assert again["tasks"] == document["tasks"] and "judging" not in err
    lost = scores_path(folder, "phantoms", "untrained-seed-0")
    lost.unlink()
    again, _, err = compared(capsys, path)
    assert again["tasks"] == document["tasks"]
    assert re.findall("judging (.*) by", err) == ["untrained-seed-0"]
    assert {p for p, at in stamps.items() if p.stat().st_mtime_ns != at} == {lost}
    assert len(alone) == 2

    # One more seed of what is there: the others stay.
    more, _, _ = compared(capsys, path, "--set", "seeds=[0, 1]")
    assert alone[2:] == ["mlvicx-seed-1", "vicreg-seed-1"]
    cell = more["tasks"]["phantoms"]["auroc"]["vicreg"]["mean"]
    first = task["auroc"]["vicreg"]["mean"]["seeds"]["0"]
    assert cell["seeds"]["0"] == first and len(cell["seeds"]) == 2

    page_of(folder, more, capsys)
    refusals_of(path, folder, capsys)
    last, _, _ = compared(capsys, path, "--set", "seeds=[0, 1]")
    assert last["tasks"] == more["tasks"] and len(alone) == 4
    assert json.loads((folder / "comparison.json").read_text())["tasks"] == more["tasks"]


def page_of(folder, document, capsys):
    """The page and the tables say what the JSON says."""
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    value = document["tasks"]["phantoms"]["auroc"]["mlvicx"]["mean"]["value"]
    for words in ("Label efficiency", "ROC, mean over", "What the context looks at", "view AP"):
        assert words in page
    assert f"{value:.3f} [" in page and 'src="http' not in page
    over = document["tasks"]["phantoms"]["few_labels"][0]["over_best"]
    words = f"{over['baseline']}, of the others the best on the validation images: AUROC "
    assert f"{words}{over['value']:+.3f} [{over['low']:+.3f}" in page
    assert "mlvicx-seed-0" in page and page.count("data:image/jpeg;base64,") == 1
    table = (folder / "comparison.md").read_text()
    assert f"| mlvicx | 2 | {value:.3f} [" in table
    config = opened(folder)
    lines = compare.Comparison(folder, found(folder, config)).lines()
    assert any(line.startswith("mlvicx ") and f"{value:.3f} [" in line for line in lines)
    assert max(map(len, lines[:-2])) <= 100


def refusals_of(path, folder, capsys):
    """What was changed is refused by name; what is added or left out is not."""
    for change, words in [
        ("pretrain.loss.lambda_local=3", "pretrain.loss.lambda_local was 1.0 and is 3.0"),
        ("methods.vicreg={model.projector.width: 8}", "methods.vicreg.model.projector.width was"),
        ("tasks.0.probe.l2=[0.2]", "tasks.phantoms.probe.l2.0 was 0.1 and is 0.2"),
        ("budget=time", "budget was images and is the time of mlvicx"),
    ]:
        _, code, err = compared(capsys, path, "--set", change)
        assert code == 2 and words in err and "give this one another name" in err
    _, code, err = compared(
        capsys, path, "--set", "methods={mlvicx: {}}", "--set", "pretrain.train.log_every_steps=2"
    )
    assert code == 0 and "judging" not in err
    with only_driver(folder):
        _, code, err = compared(capsys, path)
    assert code == 2 and "another process is at work on this comparison" in err


@pytest.mark.parametrize("given", ["images", "time"])
def test_a_run_that_diverges_is_told_and_not_tried_again(
    given, alone, phantom_shards, tmp_path, capsys, monkeypatch
):
    """Nor measured again, where its rate was to be measured."""
    monkeypatch.setattr(budget, "STEPS", 1)
    monkeypatch.setattr(budget, "seconds_a_step", lambda rows, batch: 0.1)
    methods = {"mlvicx": {}, "loud": {"train.learning_rate_per_256": 1e30}}
    settings = tree(phantom_shards, tmp_path / "c", seeds=[3], methods=methods, budget=given)
    path = written(tmp_path, settings)
    document, code, err = compared(capsys, path)
    assert code == 0 and "loud-seed-3 diverged: step 1" in err
    assert "diverged: step 1" in document["missing"]["loud-seed-3"]
    assert list(document["tasks"]["phantoms"]["auroc"]) == ["mlvicx"]
    before = list(alone)
    compared(capsys, path)
    assert alone == before
    assert main(["compare", str(path)]) == 0
    assert "loud-seed-3 diverged: step 1" in capsys.readouterr().out


def test_what_learns_labels_stands_beside_and_says_so(
    alone, phantom_shards, tmp_path, capsys, monkeypatch
):
    """It may learn those of the probe's images, not of the images that choose or judge."""
    settings = tree(phantom_shards, tmp_path / "c", seeds=[0])
    settings["methods"] = {"untrained": {}, "supervised": {}}
    # No step is as good as some: what is looked at is where it stands.
    settings["pretrain"]["data"]["splits"] = ["train", "val"]
    path = written(tmp_path, settings)
    for splits in (["val"], ["train", "val"]):
        _, code, err = compared(
            capsys, path, "--set", f"methods.supervised={{loss.label_splits: {splits}}}"
        )
        assert code == 2 and not alone
        assert "methods.supervised, task phantoms, its splits val, test: the encoder" in err
    document, code, _ = compared(capsys, path)
    assert (code, document["missing"], alone) == (0, {}, ["supervised-seed-0"])
    task = document["tasks"]["phantoms"]
    assert list(task["difference"]["auroc"]) == ["supervised"]
    assert task["over_best"] is None
    assert document["methods"]["supervised"]["labels"] == ["train"]
    words = "\n".join(markdown(document))
    assert "supervised: its encoder learned the labels of the split train of the pre" in words
    assert "supervised: its encoder learned all labels of the split train." in words


def test_a_task_by_folds_judges_all_images_and_nobody_that_learned_their_labels(
    alone, phantom_shards, tmp_path, capsys
):
    settings = tree(phantom_shards, tmp_path / "c", seeds=[0], methods={"untrained": {}})
    task = {k: v for k, v in settings["tasks"][0].items() if k != "few_labels"}
    settings["tasks"] = [{**task, "name": "all", "folds": 3}, *settings["tasks"]]
    path = written(tmp_path, settings)
    document, code, _ = compared(capsys, path)
    assert code == 0
    by_folds, by_splits = (document["tasks"][name] for name in ("all", "phantoms"))
    assert by_folds["images"] == sum(one["images"] for one in by_splits["splits"].values())
    assert f"{by_folds['patients']} test patients in 3 folds" in "\n".join(markdown(document))
    learner = "methods.supervised={loss.label_splits: [train]}"
    _, code, err = compared(capsys, path, "--set", learner)
    assert code == 2 and alone == []
    assert "methods.supervised, task all, its splits train, val, test: the encoder learned" in err


@pytest.mark.parametrize(("at_once", "threads"), [(1, 2), (2, 1)])
def test_what_judges_beside_runs_takes_one_core(
    at_once, threads, alone, phantom_shards, tmp_path, capsys, monkeypatch
):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(compare, "_train", lambda *_: seen.append(torch.get_num_threads()) or 0)
    methods = {"mlvicx": {}}
    settings = tree(phantom_shards, tmp_path / "c", methods=methods, at_once=at_once)
    torch.set_num_threads(2)
    try:
        compared(capsys, written(tmp_path, settings))
        assert (seen, torch.get_num_threads()) == ([threads], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_equal_time_gives_a_faster_method_more_steps(
    alone, phantom_shards, tmp_path, capsys, monkeypatch
):
    rates = {"mlvicx": 0.3, "vicreg": 0.2}
    monkeypatch.setattr(budget, "seconds_a_step", lambda rows, batch: rates[alone[-1][:-7]])
    monkeypatch.setattr(budget, "STEPS", 4)
    methods = {"vicreg": {}, "mlvicx": {}, "pixels": {}}
    settings = tree(phantom_shards, tmp_path / "c", seeds=[0], methods=methods, budget="time")
    settings["reference"] = "mlvicx"
    path = written(tmp_path, settings)
    document, code, _ = compared(capsys, path)
    assert code == 0
    steps = {m: one["runs"]["0"]["steps"] for m, one in document["methods"].items() if one["runs"]}
    total = steps["mlvicx"]
    assert steps == {"mlvicx": total, "vicreg": total * 3 // 2} and total > 2
    assert document["methods"]["vicreg"]["measured_s_a_step"] == 0.2
    # What was measured is not measured again.
    assert len(alone) == 4
    compared(capsys, path, "--set", "seeds=[0, 1]")
    assert alone[4:] == ["vicreg-seed-1", "mlvicx-seed-1"]


@pytest.mark.slow
def test_a_task_says_what_an_evaluation_says(alone, phantom_shards, tmp_path, capsys):
    """The same run, shards and settings: the same areas, and for the floors too."""
    path = written(tmp_path, tree(phantom_shards, tmp_path / "c", seeds=[5]))
    document, _, _ = compared(capsys, path)
    folder = tmp_path / "c" / "small"
    task = to_tree(opened(folder).tasks[0])
    config = parse_config(task, "task")
    assert isinstance(config, EvaluateConfig)
    # Its checkpoints are gone: the export tells the seed that the untrained encoder has.
    encoder = load_encoder(folder / "runs" / "mlvicx-seed-5")
    result, _ = evaluate_checkpoint(folder / "runs" / "mlvicx-seed-5", config, out=tmp_path)
    found = document["tasks"]["phantoms"]
    for metric, theirs in (("auroc", result["probe"]), ("auprc", result["auprc"])):
        for ours, name in (
            ("mlvicx", "pretrained"),
            ("untrained", "untrained"),
            ("pixels", "pixels"),
        ):
            for one in [*result["classes"], "mean"]:
                assert found[metric][ours][one]["value"] == pytest.approx(
                    theirs[name][one]["value"]
                )
    share = result["few_labels"][0]["pretrained"]["value"]
    assert found["few_labels"][0]["methods"]["mlvicx"]["value"] == pytest.approx(share)
    assert found["subgroups"]["view AP"]["images"] == result["subgroups"]["view AP"]["images"]
    # The untrained encoder is the one that the run of its seed started from.
    plan = compare_plan.make_plan(opened(folder))
    method = next(m for m in plan.methods if m.floor == "untrained")
    ours, theirs = compare._encoder(plan, method, 5), untrained(encoder, 5)
    images = torch.randint(0, 255, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-6)


def test_tasks_that_cannot_be_judged_are_refused_before_a_run(
    alone, phantom_shards, tmp_path, capsys
):
    settings = tree(phantom_shards, tmp_path / "c")
    path = written(tmp_path, settings)
    _, code, err = compared(capsys, path, "--set", "tasks.0.classes=[tumour]")
    assert code == 2 and "tasks, phantoms: classes names 'tumour'" in err
    _, code, err = compared(capsys, path, "--set", "tasks.0.data.test=holdout")
    assert code == 2 and "holdout" in err
    _, code, err = compared(capsys, path, "--set", "storage_path=s3://bucket/c")
    assert code == 2 and "a comparison is kept in a folder" in err
    # Nothing of these keeps the right settings away, in the same folder.
    _, code, err = compared(capsys, path, "--set", "methods={pixels: {}}")
    assert code == 0 and alone == [], err


def test_settings_of_speed_make_another_comparison_at_equal_time(phantom_shards, tmp_path):
    """Measured rates are those of the same workers; at equal images these change nothing."""
    for given in ("images", "time"):
        plain = tree(phantom_shards, tmp_path, budget=given)
        known = compare_plan._identity(parse_config(plain, "t"), ["manifest"])
        for section, changed in [
            ("workers", {"num": 2}),
            ("workers", {"min": 1}),
            ("workers", {"cpus_per_worker": 2}),
            ("workers", {"use_gpu": True}),
            ("data", {"loader_workers": 2}),
            ("train", {"recompute": True}),
            ("train", {"gather_rows": True}),
        ]:
            pretrain = dict(plain["pretrain"])
            pretrain[section] = pretrain.get(section, {}) | changed
            config = parse_config(plain | {"pretrain": pretrain}, "t")
            other = compare_plan._identity(config, ["manifest"])
            assert (other == known) == (given == "images"), (given, section, changed)


def test_the_weights_that_a_method_starts_from_are_part_of_it(
    phantom_shards, tmp_path, monkeypatch
):
    """By their content, wherever they lie; the path holds for workers in another folder."""
    monkeypatch.chdir(tmp_path)

    def plan(path, content):
        (tmp_path / path).mkdir(exist_ok=True)
        (tmp_path / path / "encoder.safetensors").write_bytes(content)
        methods = {"mlvicx": {}, "later": {"train.init_from": path}}
        return compare_plan.make_plan(parse_config(tree(phantom_shards, "c", methods=methods), "t"))

    first = plan("a", b"weights")
    assert first.methods[1].settings.train.init_from == str(tmp_path / "a")
    assert plan("b", b"weights").identity == first.identity
    assert plan("a", b"others").identity != first.identity


def test_a_damaged_list_of_what_diverged_is_not_written_over(tmp_path):
    damaged = tmp_path / "diverged.json"
    damaged.write_text('{"vicreg-seed-0": ')
    with pytest.raises(DataError, match="the file is damaged; restore"):
        write_diverged(tmp_path, "step 1", "simclr-seed-0")
    assert damaged.read_text() == '{"vicreg-seed-0": '


def test_files_are_read_as_they_were_written(phantom_shards, tmp_path):
    settings = tree(phantom_shards, tmp_path)
    config = parse_config(settings, "t")
    images = images_of(Task.model_validate(settings["tasks"][0]), config.pretrain)
    write_images(tmp_path / "a.npz", images)
    back = read_images(tmp_path / "a.npz")
    assert np.array_equal(back.labels, images.labels, equal_nan=True)
    assert back.about == images.about and back.classes == images.classes
    assert all(np.array_equal(back.groups[k], v) for k, v in images.groups.items())
    assert images.about["overlap"]["images"] == 0
    rng = np.random.default_rng(0)
    few = [None, (rng.normal(size=5), rng.normal(size=(5, 100)))]
    scores = Scores(rng.normal(size=(18, 2)), 0.7, few, rng.normal(size=(18, 2)))
    write_scores(tmp_path / "b.npz", scores)
    again = read_scores(tmp_path / "b.npz")
    assert again.few[0] is None and np.array_equal(again.few[1][1], few[1][1])
    assert np.array_equal(again.probe, scores.probe) and again.validation_auroc == 0.7
    assert read_scores(tmp_path / "none.npz") is None
    data = (tmp_path / "b.npz").read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    # An array alone; one that calls itself encrypted; packed in another way; of another name.
    central = data.index(b"PK\x01\x02")
    for damaged in (
        data[:200],
        buffer.getvalue(),
        data[: central + 8] + b"\x01" + data[central + 9 :],
        data[: central + 10] + b"\x63" + data[central + 11 :],
        data.replace(b"probe.npy", b"frobe.npy"),
    ):
        assert damaged != data
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged; remove it and run"):
            read_scores(tmp_path / "b.npz")


def test_the_plane_is_that_of_the_principal_components():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 6)) @ np.diag([5, 3, 1, 1, 1, 1])
    _, vectors = np.linalg.eigh(np.cov(features.T))
    expected = (features - features.mean(0)) @ vectors[:, [-1, -2]]
    assert np.allclose(np.abs(plane(features)), np.abs(expected), atol=1e-4)
    assert np.array_equal(plane(features), plane(features.copy()))
    assert plane(features[:, :1]).shape == (50, 2)


@pytest.mark.slow
def test_a_comparison_on_ray(phantom_shards, tmp_path, capsys):
    """Two runs at once by tasks that hold no core; the same command then has nothing to do."""
    methods = {"mlvicx": {}, "no_context": {"model.context": False}, "pixels": {}}
    settings = tree(phantom_shards, tmp_path / "c", seeds=[0], methods=methods, at_once=2)
    path = written(tmp_path, settings)
    with ray_session({"CPU": 2}, asked="the test", remedy="take two cores"):
        document, code, err = compared(capsys, path)
        assert (code, document["missing"]) == (0, {}), err
        again, code, err = compared(capsys, path)
    assert code == 0 and "training" not in err and "judging" not in err
    assert again["tasks"] == document["tasks"]
    folder = tmp_path / "c" / "small"
    assert (folder / "runs" / "no_context-seed-0" / "state.json").exists()
    assert document["tasks"]["phantoms"]["over_best"]["baseline"] == "pixels"
    assert len(methods_of(opened(folder))) == 3
    assert os.listdir(folder / "scores") == ["phantoms"]
