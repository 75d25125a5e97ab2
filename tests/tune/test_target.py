"""Looks: their number is that of the exported encoder, for any number of workers; nothing moves."""

import numpy as np
import pytest
import torch
from group import run_group
from group import settings as group_settings

from mlvicx_dist.config import Probe, Target, parse_config, to_tree
from mlvicx_dist.errors import ConfigError, DataError, DivergenceError
from mlvicx_dist.evaluate.embed import Show, embed_samples
from mlvicx_dist.evaluate.probe import fit_probe
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.checkpoint import read_checkpoint
from mlvicx_dist.train.runlog import read_rows
from mlvicx_dist.train.step import Member
from mlvicx_dist.train.weights import load_encoder
from mlvicx_dist.tune.target import (
    Judge,
    choose,
    chosen_parts,
    common_labels,
    is_held_back,
    judged_by,
    judged_shards,
)

ONE = Member(0, 1, torch.device("cpu"))
"""The only worker."""
TARGET = Target(every_steps=2, images=16, probe=Probe(l2=[0.1], max_iterations=30))


@pytest.fixture
def run(phantom_shards, tmp_path):
    return parse_config(group_settings(phantom_shards, tmp_path), "run")


def trained(config, tmp_path, world_size, target, kind=torch.float32):
    run_dir = tmp_path / f"run{world_size}-{target is not None}"
    judge = judged_by(target) if target else None
    assert not run_group(to_tree(config), run_dir, world_size, judge=judge, kind=kind)
    return run_dir


def test_the_target_is_that_of_the_exported_encoder(run, tmp_path):
    run_dir = trained(run, tmp_path, 1, TARGET)
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "target" in row]
    total = rows[-1]["step"]
    assert [row["step"] for row in rows] == sorted({*range(2, total, 2), total})
    encoder = load_encoder(run_dir)
    parts = chosen_parts(TARGET, run, held_back=False)
    assert list(parts) == ["training", "judged"]
    features = []
    for shards, chosen in parts.values():
        samples = [sample for sample, _ in chosen]
        features += embed_samples([encoder], shards, samples, Show(32, 8, loader_workers=0))
    labels = common_labels(TARGET, parts)
    probe = fit_probe(
        features[0], labels[0], validation=(features[1], labels[1]), settings=TARGET.probe
    )
    assert rows[-1]["target"] == pytest.approx(probe.validation_auroc, abs=1e-6)
    assert 0 < rows[-1]["target/looked_s"] < rows[-1]["target/trained_s"]


def test_a_look_moves_nothing(run, tmp_path):
    with_looks, without = (trained(run, tmp_path, 1, target) for target in (TARGET, None))
    first, second = (
        read_checkpoint(sorted((path / "checkpoints").glob("*.pt"))[-1])["model"]
        for path in (with_looks, without)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_workers_find_what_one_finds(run, tmp_path):
    rows = {}
    for world_size in (1, 2):
        folder = trained(run, tmp_path, world_size, TARGET, torch.float64)
        rows[world_size] = [
            r["target"] for r in read_rows(folder / "metrics.jsonl") if "target" in r
        ]
    assert rows[2] == pytest.approx(rows[1], abs=1e-3)


@pytest.mark.parametrize("kind", ["knn", "effective_rank"])
def test_other_targets(run, tmp_path, kind):
    target = TARGET.model_copy(update={"kind": kind})
    folder = trained(run, tmp_path, 1, target)
    values = [row["target"] for row in read_rows(folder / "metrics.jsonl") if "target" in row]
    high = 1.0 if kind == "knn" else 16.0
    assert all(0 < value <= high for value in values)


def test_patients_held_back_are_in_no_look_and_in_one_half(phantom_shards, run):
    shards = judged_shards(TARGET, run, "val")
    judged = choose(shards, TARGET, held_back=False, most=None)
    held = choose(shards, TARGET, held_back=True, most=None)
    assert len(judged) + len(held) == len(shards)
    patients = [{one["patient"] for _, one in part} for part in (judged, held)]
    assert not patients[0] & patients[1]
    many = [{"source": "x", "patient": str(k)} for k in range(4000)]
    share = np.mean([is_held_back(one, 0.3) for one in many])
    assert share == pytest.approx(0.3, abs=0.03)


def test_the_test_split_is_not_opened(phantom_shards, run, monkeypatch):
    opened = []
    real = ShardSet.open.__func__

    def spy(cls, folders, *, splits, **others):
        opened.extend(splits)
        return real(cls, folders, splits=splits, **others)

    monkeypatch.setattr(ShardSet, "open", classmethod(spy))
    judge = Judge(TARGET, run, ONE)
    assert sorted(set(opened)) == ["train", "val"]
    splits = {d.shards.about(sample)["split"] for d, sample in judge._chosen}
    assert splits == {"train", "val"}


def test_what_cannot_be_judged_is_a_sentence(run):
    with pytest.raises(DataError, match="no images of the split vall"):
        Judge(TARGET.model_copy(update={"val": "vall"}), run, ONE)
    with pytest.raises(ConfigError, match="classes names 'x'"):
        Judge(TARGET.model_copy(update={"classes": ["x"]}), run, ONE)
    with pytest.raises(DataError, match=r"would be judged, where two are needed"):
        Judge(TARGET.model_copy(update={"held_back": 0.9999}), run, ONE)


def test_a_look_at_weights_that_diverged_says_so(run):
    judge = Judge(TARGET, run, ONE)
    model = build_model(run.model, 0)
    assert 0 <= judge(model)["target"] <= 1
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="the weights diverged"):
        judge(model)
