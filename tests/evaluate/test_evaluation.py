"""Evaluation from a run's folder to its JSON, and the page that shows it."""

import dataclasses
import json

import numpy as np
import pytest

from mlvicx_dist.cli import main
from mlvicx_dist.config import EvaluateConfig, parse_config
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.evaluation import evaluate
from mlvicx_dist.evaluate.parts import parts_of, with_no_finding
from mlvicx_dist.evaluate.summary import summary
from mlvicx_dist.report.charts import of_evaluation


def settings(**changes):
    tree = {"kind": "evaluate", "name": "t", "data": {"shards": ["x"]}, "bootstrap": {"draws": 200}}
    config = parse_config({**tree, **changes}, "t")
    assert isinstance(config, EvaluateConfig)
    return config


@pytest.fixture
def embeddings():
    """300 patients; the first encoder sees class a, only pixels show b; c is positive nowhere."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 2, 300), rng.integers(0, 2, 300), np.zeros(300)], 1)
    seeing = rng.normal(size=(300, 6)).astype(np.float32)
    seeing[:, 0] += 2 * labels[:, 0]
    blind = rng.normal(size=(300, 6)).astype(np.float32)
    splits = ["train"] * 150 + ["val"] * 50 + ["test"] * 100
    about = tuple(
        {"split": s, "patient": str(i), "source": "s", "key": str(i)} for i, s in enumerate(splits)
    )
    dark = np.clip(rng.normal(0.5, 0.1, (300, 576)), 0, 1).astype(np.float32)
    dark[:, 100] += labels[:, 1]
    return Embeddings((seeing, blind, dark), labels.astype(float), ("a", "b", "c"), about)


def test_what_is_there_is_found_and_what_is_not_is_not(embeddings):
    result = evaluate(embeddings, settings())
    difference = result["probe"]["difference"]
    assert difference["a"]["low"] > 0.1
    assert difference["b"]["low"] < 0 < difference["b"]["high"]
    assert result["probe"]["pretrained"]["a"]["value"] > 0.85
    assert result["knn"]["pretrained"]["a"]["value"] > 0.75
    assert result["probe"]["pixels"]["b"]["low"] > 0.7
    assert (
        result["probe"]["over_pixels"]["b"]["high"] < 0 < result["probe"]["over_pixels"]["a"]["low"]
    )
    assert result["classes"] == ["a", "b"]
    assert "only 0 for c in the split train" in result["left_out"]["c"]
    mean = np.mean([result["probe"]["pretrained"][c]["value"] for c in "ab"])
    assert result["probe"]["pretrained"]["mean"]["value"] == pytest.approx(mean)
    json.dumps(result)


def test_precision_calibration_and_delong_stand_beside_auroc(embeddings):
    result = evaluate(embeddings, settings())
    seeing, blind = (result["auprc"][kind] for kind in ("pretrained", "untrained"))
    assert seeing["a"]["low"] > blind["a"]["high"] > result["shares"]["a"]
    assert result["auprc"]["difference"]["a"]["low"] > 0.1
    assert result["delong"]["a"] < 1e-6 < 0.01 < result["delong"]["b"]
    errors = result["calibration"]
    assert errors["pretrained"]["a"]["brier"] < 0.23 < errors["untrained"]["a"]["brier"] < 0.35
    mean = np.mean([errors["pretrained"][c]["ece"] for c in "ab"])
    assert errors["pretrained"]["mean"]["ece"] == pytest.approx(mean)
    assert 0 < mean < 0.5


def test_a_p_value_that_is_not_defined_is_a_dash(embeddings):
    """One positive of b in the test split: no variance, and no NaN in the file."""
    embeddings.labels[200:, 1] = 0
    embeddings.labels[250, 1] = 1
    result = evaluate(embeddings, settings())
    assert result["delong"]["b"] is None
    json.dumps(result, allow_nan=False)
    (row,) = (line for line in summary(result) if line.startswith("b ") and "1.0%" in line)
    assert row.endswith(" -")
    assert "<.0001" not in row
    result["delong"]["b"] = float("nan")
    assert row in summary(result)


def test_a_test_split_that_chooses_is_refused():
    with pytest.raises(ConfigError, match="test must be a split of its own"):
        settings(data={"shards": ["x"], "val": "test"})


def test_draws_without_a_positive_are_counted(embeddings):
    labels = embeddings.labels.copy()
    labels[200:, 1] = 0
    labels[200:202, 1] = 1
    few = dataclasses.replace(embeddings, labels=labels)
    for one in few.about:
        one["sex"] = "F"
    result = evaluate(few, settings())
    # No draw of 100 patients holds either of two: 0.98 ** 100 = 0.133.
    assert 10 < result["undefined_draws"]["b"] < 50
    assert "a" not in result["undefined_draws"]
    lines = summary(result)
    count = result["undefined_draws"]["b"]
    assert any(line.startswith(f"b: {count} of 200 draws") for line in lines)
    assert f"sex F: draws that held one label value only: b in {count}." in lines


def test_an_embedding_that_is_no_number_is_an_error(embeddings):
    embeddings.features[1][7, 2] = np.nan
    with pytest.raises(DataError, match="untrained encoder's embeddings of 1 of 300 images"):
        evaluate(embeddings, settings())


def test_the_summary_fits_on_100_columns(embeddings):
    renamed = dataclasses.replace(embeddings, classes=("a" * 40, "Pleural_Thickening", "c"))
    for place, one in enumerate(renamed.about):
        one |= {"sex": "FM"[place % 2], "age": place % 60, "view": "PA"}
    result = evaluate(renamed, settings(few_labels={"fractions": [0.01, 0.5, 1.0]}))
    lines = summary(result)
    assert any(line.startswith("50.0%, 75 ") for line in lines)
    assert any(line.startswith("Left out at 1.0%: ") for line in lines)
    assert any(line.startswith("age 40-64 ") for line in lines)
    assert "view AP: no image." in lines
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("Pleural_Thickening ") for line in lines)
    titles = [chart["title"] for chart in of_evaluation(result)]
    assert "What it adds in subgroups, mean" in titles
    assert "What it adds with few labels, mean" in titles


def test_the_test_images_choose_nothing(embeddings):
    """Other test labels change the areas and nothing that was chosen."""
    first = evaluate(embeddings, settings())
    embeddings.labels[200:, :2] = 1 - embeddings.labels[200:, :2]
    second = evaluate(embeddings, settings())
    assert first["penalty"] == second["penalty"]
    area = first["probe"]["pretrained"]["a"]["value"]
    assert second["probe"]["pretrained"]["a"]["value"] == pytest.approx(1 - area)


def test_mistakes_are_named(embeddings):
    with pytest.raises(ConfigError, match="classes names 'aa'"):
        evaluate(embeddings, settings(classes=["aa"]))
    with pytest.raises(DataError, match="no class has both labels"):
        evaluate(embeddings, settings(classes=["c"]))
    embeddings.about[250]["patient"] = "7"
    with pytest.raises(DataError, match="1 patients of the split 'test' of x are in 'train' or"):
        evaluate(embeddings, settings())
    with pytest.raises(DataError, match="split 'dev' is empty"):
        evaluate(embeddings, settings(data={"shards": ["x"], "val": "dev"}))


def test_from_a_run_to_its_page(phantom_shards, tmp_path, capsys):
    """One process, no Ray: the loop itself, then evaluate, embed, export and report."""
    import torch
    import yaml

    from mlvicx_dist.config import PretrainConfig, to_tree
    from mlvicx_dist.train.loop import train
    from mlvicx_dist.train.notices import NoNotices
    from mlvicx_dist.train.step import Member

    tree = {
        "kind": "pretrain",
        "run": {"name": "r<b>".replace("<b>", "-b"), "storage_path": str(tmp_path)},
        "data": {"shards": [{"path": str(phantom_shards)}], "loader_workers": 0},
        "views": {"image_size_px": 32, "blur_kernel_px": 5},
        "model": {
            "backbone": "test_resnet",
            "projector": {"width": 8},
            "local": {"resize_px": 8, "channels": 4, "pool": 2, "fusion": "per_level"},
            "levels": [1, 3],
        },
        "train": {"batch_size": 8, "epochs": 2, "optimizer": "adamw", "log_every_steps": 1},
    }
    config = parse_config(tree, "t")
    assert isinstance(config, PretrainConfig)
    run_dir = tmp_path / "r-b"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    reported = []
    alone = Member(0, 1, torch.device("cpu"))
    train(config, run_dir, alone, report=reported.append, notices=NoNotices())
    assert {"level1/variance_weighted", "level3/std", "encoder/rankme"} <= reported[-1].keys()

    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert "Not evaluated yet" in page
    assert f"configs/evaluate/cpu.yaml --set data.shards.0={phantom_shards}<" in page
    (tmp_path / "e.yaml").write_text(
        f"kind: evaluate\nname: phantoms\ndata: {{shards: [{phantom_shards}]}}\n"
        "bootstrap: {draws: 100}\n"
    )
    given = ["evaluate", str(run_dir), str(tmp_path / "e.yaml")]
    if not torch.cuda.is_available():
        # Before the embedding, of which nothing would be kept.
        assert main([*given, "--set", "segment={}", "--set", "embedding.use_gpu=true"]) == 2
        assert "no GPU that PyTorch can use" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    written = json.loads((run_dir / "evaluations" / "phantoms.json").read_text())
    assert written == result
    assert (result["overlap"]["images"], result["overlap"]["same_key"]) == (0, 0)
    assert result["overlap"]["seen"] > 20
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert f"{result['probe']['pretrained']['mean']['value']:.3f}" in page
    assert f"{result['probe']['pixels']['mean']['value']:.3f}" in page
    assert "What it adds in subgroups, mean" in page
    assert "What it adds with few labels, mean" not in page
    assert "Overlap with the pretraining shards: 0 of" in page
    assert "Weighted terms, level3" in page
    assert "data:image/jpeg;base64," in page
    assert 'src="http' not in page

    assert "Fine-tuned" not in page
    cells = {
        name: {"value": 0.125, "low": 0.1, "high": 0.2}
        for name in (
            "pretrained",
            "untrained",
            "difference",
            "random",
            "centre",
            "whole",
            "over_random",
            "over_centre",
            "over_whole",
            "nothing",
            "over_nothing",
        )
    }
    by_class = {
        kind: {c: cell for c in [*result["classes"], "mean"]} for kind, cell in cells.items()
    }
    result["settings"]["segment"] = {"train_encoder": False}
    result |= {
        "fine_tune": {
            "auroc": by_class,
            "epochs": {"pretrained": {"best": 2, "validation_auroc": [0.5, 0.6, 0.5]}},
        },
        "segment": {
            "images": 9,
            "positives": 4,
            "unmarked": 3,
            "size_px": 32,
            "dice": {"all": cells, "positive": cells},
        },
        "localise": {"images": 9, "peak": cells, "overlap": cells},
    }
    (run_dir / "evaluations" / "phantoms.json").write_text(json.dumps(result))
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    for words in (
        "Epoch taken of those run: pretrained 2 of 3.",
        "Left out: 3 test images without any mask",
        "0.125 of the centre",
        '<th scope="row">with a mask</th><td>4</td>',
    ):
        assert words in page
    once = (
        "Each encoder was trained once, with one seed: the intervals resample patients and do not"
    )
    assert page.count(once) == sum(line.startswith(once) for line in summary(result)) == 2
    assert any(line.startswith("with a mask ") for line in summary(result))
    assert max(map(len, summary(result))) <= 100

    again = ["evaluate", str(run_dir), str(tmp_path / "e.yaml"), "--set", "overlap=false"]
    capsys.readouterr()
    assert main(again) == 0
    assert "unknown (overlap is off)" in capsys.readouterr().out

    out = tmp_path / "e.parquet"
    assert main(["embed", str(run_dir), str(phantom_shards), "--out", str(out)]) == 0
    assert "Not evaluated." in next((run_dir / "exports").glob("*/README.md")).read_text()
    assert main(["export", str(run_dir), "--out", str(tmp_path / "x")]) == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert "Not evaluated." not in card
    assert "### phantoms" in card
    # Every line of what `mlvicx evaluate` prints, but for the folder that the overlap names.
    shown = [line for line in summary(result) if "Overlap" not in line]
    assert "\n".join(shown[:6]) in card
    assert f"| {result['overlap']['seen']} | phantom (60) | `" in card
    assert str(tmp_path) not in card
    assert main(["export", str(tmp_path / "x"), "--out", str(tmp_path / "y")]) == 0
    assert (tmp_path / "y" / "README.md").read_text() == card

    # An export lies in no run: beside it may be anything.
    alone = ["evaluate", str(tmp_path / "x"), str(tmp_path / "e.yaml")]
    capsys.readouterr()
    assert main(alone) == 2
    assert "these weights lie in no run" in capsys.readouterr().err
    assert main([*alone, "--out", str(tmp_path / "found")]) == 0
    assert (tmp_path / "found" / "phantoms.json").exists()

    (run_dir / "evaluations" / "phantoms.json").write_text("{")
    capsys.readouterr()
    assert main(["report", str(run_dir)]) == 2
    assert "phantoms.json: the file is damaged; evaluate again" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_an_error(phantom_shards, tmp_path, capsys):
    import torch

    from mlvicx_dist.config import PretrainConfig, to_tree
    from mlvicx_dist.train.checkpoint import save_checkpoint

    config = PretrainConfig.model_validate(
        {
            "kind": "pretrain",
            "run": {"name": "r"},
            "data": {"shards": [{"path": "x"}]},
            "model": {"backbone": "test_resnet", "projector": {"width": 8}},
        }
    )
    state = {
        "step": 1,
        "model": {"encoder.backbone.conv1.weight": torch.zeros(3)},
        "optimizer": {},
        "settings": to_tree(config),
        "manifests": [],
        "versions": {},
    }
    save_checkpoint(tmp_path, state, keep=1)
    out = str(tmp_path / "e.parquet")
    assert main(["embed", str(tmp_path), str(phantom_shards), "--out", out]) == 2
    error = capsys.readouterr().err
    assert "the weights do not fit the model" in error
    assert len(error.strip().splitlines()) == 1


def test_no_finding_is_what_has_none_of_the_classes(embeddings):
    labels = embeddings.labels.copy()
    labels[:4] = [[1, 0, np.nan], [0, 0, np.nan], [0, 0, 0], [0, np.nan, 1]]
    changed = with_no_finding(dataclasses.replace(embeddings, labels=labels))
    assert changed.classes == ("a", "b", "c", "No Finding")
    assert np.array_equal(changed.labels[:4, 3], [0, np.nan, 1, 0], equal_nan=True)
    assert np.array_equal(changed.labels[:, :3], labels, equal_nan=True)
    # Of all classes of the shards, whichever are judged.
    parts = parts_of(embeddings, settings(no_finding=True, classes=["a"]))
    assert parts.classes == ["a", "No Finding"]
    none = ~(embeddings.labels[200:] == 1).any(1)
    assert np.array_equal(parts.test.labels[:, 1], none)
    with pytest.raises(ConfigError, match="have a class 'No Finding' already"):
        with_no_finding(changed)
