"""Training on labels: which are read, what is masked, that it learns, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from group import run_group
from group import settings as run_settings
from torch.nn import functional

from mlvicx_dist import load_encoder
from mlvicx_dist.config import Views, parse_config, to_tree
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.objective.labels import label_loss
from mlvicx_dist.report.charts import of_run
from mlvicx_dist.report.run import _heads
from mlvicx_dist.stream.labels import Labels
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.rates import training_step
from mlvicx_dist.train.source import open_shards, with_classes

VIEWS = Views(image_size_px=32, blur_kernel_px=5)


def config(*folders, splits=("train",), **changes):
    tree = run_settings("x", Path("runs"), **changes)
    tree["data"] |= {"shards": [{"path": str(folder)} for folder in folders], "splits": splits}
    return parse_config({**tree, "method": "supervised"}, "a.yaml")


def resolved(*folders, **changes):
    settings = config(*folders, **changes)
    return with_classes(settings, open_shards(settings))


@pytest.fixture(scope="module")
def packed(phantom_records, salt, tmp_path_factory):
    """Packs some of the phantoms with other labels."""

    def make(name, change, count=12):
        out = tmp_path_factory.mktemp("labels") / name
        records = [replace(one, labels=change(one.labels)) for one in phantom_records[:count]]
        settings = PackSettings(short_side_px=48, fractions=Fractions(1.0, 0.0, 0.0))
        pack(records, out, settings=settings, salt=salt)
        return out

    return make


def test_the_loss_is_the_mean_over_known_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (5, 3), generator=generator).double()
    labels[1], labels[3, 0] = torch.nan, torch.nan
    known = ~labels.isnan()
    plain = functional.binary_cross_entropy_with_logits(logits[known], labels[known])
    assert label_loss(logits, labels).item() == pytest.approx(plain.item(), abs=1e-15)
    low = label_loss(logits.bfloat16(), labels.float())
    assert low.dtype == torch.float32
    nothing = logits.clone().requires_grad_()
    label_loss(nothing, torch.full_like(labels, torch.nan)).backward()
    assert not nothing.grad.any()


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_travel_with_their_images_and_change_nothing_else(phantom_shards, workers):
    shards = ShardSet.open([phantom_shards], splits=["train", "val"])
    classes = (*shards.classes[::-1], "of another folder")
    options = {"batch": 7, "seed": 3}
    labelled = Steps(shards, VIEWS, **options, labels=Labels(classes, ("train",)))
    plain = Steps(shards, VIEWS, **options)
    masked = 0
    for step in range(0, 2 * plain.steps_per_epoch, 3):
        (one,) = batches(labelled, start=step, stop=step + 1, workers=workers)
        other = plain[step]
        assert other.labels is None
        for name in ("samples", "images", "table"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.labels.dtype == torch.float32
        for sample, row in zip(one.samples.tolist(), one.labels.numpy(), strict=True):
            about = shards.about(sample)
            if about["split"] != "train":
                masked += 1
                assert np.isnan(row).all()
                continue
            assert np.isnan(row[-1])
            assert {c: int(v) for c, v in zip(classes, row[:-1], strict=False)} == about["labels"]
    assert masked


def test_classes_of_several_folders_are_joined_by_name(packed, phantom_shards, capsys):
    there = ShardSet.open([phantom_shards], splits=["train"]).classes
    other = packed("other", lambda labels: {"new": 1, there[0]: labels[there[0]]})
    bare = packed("bare", lambda labels: {there[0]: None})
    found = resolved(phantom_shards, other, bare)
    assert found.model.classes == [*there, "new"]
    assert with_classes(found, open_shards(found)) == found
    assert parse_config(to_tree(found), "again") == found
    said = capsys.readouterr().err
    assert f"{bare}: no image of the split train has a label" in said
    assert str(other) not in said
    chosen = resolved(phantom_shards, other, model__classes=["new"])
    assert chosen.model.classes == ["new"]


def test_what_has_no_label_is_refused(packed, phantom_shards):
    bare = packed("bare", lambda labels: dict.fromkeys(labels))
    none = packed("none", lambda labels: {})
    with pytest.raises(DataError, match=r"no image of the split train has a label of .*\.$"):
        resolved(bare, none)
    with pytest.raises(DataError, match="there is no split 'val'"):
        resolved(
            packed("given", dict),
            splits=["train", "val"],
            loss__label_splits=["val"],
        )
    with pytest.raises(ConfigError, match=r"names 'nodul', which the shards .*did you mean"):
        resolved(phantom_shards, model__classes=["nodul"])


def test_a_short_training_on_labels_lowers_the_loss_and_exports(phantom_shards, tmp_path):
    changes = {"epochs": 20, "batch_size": 24, "learning_rate_per_256": 0.05}
    settings = resolved(phantom_shards, **{f"train__{k}": v for k, v in changes.items()})
    tree = to_tree(settings)
    tree["run"] |= {"storage_path": str(tmp_path), "samples_path": None}
    tree["checkpoint"] = {}
    run_dir = tmp_path / "small"
    assert not run_group(tree, run_dir, 1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert 0.5 < rows[0]["loss"] < 1.0
    assert np.mean([row["loss"] for row in rows[-3:]]) < 0.95 * rows[0]["loss"]
    # It has no embedding whose deviation could be drawn.
    assert _heads(rows) == []
    assert "Standard deviation" not in str([chart["title"] for chart in of_run(rows, [])])
    (export,) = (run_dir / "exports").iterdir()
    encoder = load_encoder(export)
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, encoder.features)
    card = (export / "README.md").read_text()
    assert "without labels" not in card
    assert f"with the labels of {settings.model.classes[0]}, " in card


def test_a_step_is_timed_before_the_classes_are_known(phantom_shards):
    training_step(config(phantom_shards), 2, torch.device("cpu"))()
