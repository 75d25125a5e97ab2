"""Fine-tuning: what it learns, what ends it, what it never sees; two workers are one."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from discs import MODEL, settings
from processes import free_port, run_processes
from torch.nn import functional

from mlvicx_dist.config import FineTune
from mlvicx_dist.errors import ConfigError, DivergenceError, TrainingError
from mlvicx_dist.evaluate import finetune
from mlvicx_dist.evaluate.embed import embed_shards
from mlvicx_dist.evaluate.evaluation import evaluate_checkpoint
from mlvicx_dist.evaluate.finetune import (
    Labelled,
    Look,
    fine_tune,
    train_classifier,
)
from mlvicx_dist.evaluate.metrics import auroc
from mlvicx_dist.evaluate.parts import parts_of
from mlvicx_dist.evaluate.pixels import Pixels
from mlvicx_dist.evaluate.summary import summary
from mlvicx_dist.model.encoder import Encoder, untrained
from mlvicx_dist.model.export_folder import save_export
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.labels import label_loss
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train import group
from mlvicx_dist.train.failures import Failures
from mlvicx_dist.train.step import Member

SIZE_PX = 32
ALONE = Look(Member(0, 1, torch.device("cpu")), SIZE_PX, 0)


def make_encoder():
    return Encoder.from_model(build_model(MODEL, 0), SIZE_PX).eval()


def labelled(folder, split):
    shards = ShardSet.open([folder], splits=[split])
    known = [shards.about(sample)["labels"]["disc"] for sample in range(len(shards))]
    return Labelled(shards, np.array(known, float)[:, None])


class Recorded:
    """A look that tells of each time: the weights, and whose images."""

    def __init__(self):
        self.member, self.size_px, self.loader_workers = ALONE.member, SIZE_PX, 0
        self.weights, self.shards = [], []

    def __call__(self, model, shards, tune):
        self.weights.append({k: v.clone() for k, v in model.state_dict().items()})
        self.shards.append(shards)
        return ALONE(model, shards, tune)


def test_the_loss_is_the_mean_over_known_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels = (torch.rand(6, 3, generator=generator) < 0.5).double()
    labels[0, 1] = labels[4, 2] = torch.nan
    known = ~labels.isnan()
    plain = functional.binary_cross_entropy_with_logits(logits[known], labels[known])
    assert label_loss(logits, labels) == pytest.approx(float(plain), abs=1e-15)
    assert label_loss(logits, torch.full_like(labels, torch.nan)) == 0


def test_it_learns_what_tells_the_images_apart(disc_shards):
    tune = FineTune(epochs=6, batch_size=8, learning_rate_per_256=0.2)
    train, val, test = (labelled(disc_shards, split) for split in ("train", "val", "test"))
    encoder = make_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    tuned = train_classifier(encoder, train, val, tune, ALONE)
    scores = ALONE(tuned.model, test.shards, tune)
    assert scores.shape == (24, 1)
    assert auroc(scores[:, 0], test.labels[:, 0]) > 0.85
    moved = {
        k for k, v in tuned.model.encoder.state_dict().items() if not torch.equal(v, before[k])
    }
    # The first convolution learns too.
    assert {k for k in before if k.endswith("conv1.weight")} & moved


def test_the_validation_images_end_it_and_the_best_epoch_stays(disc_shards, monkeypatch):
    """AUROC 0.6, 0.8, 0.7, 0.8: with two of patience the fourth epoch is the last."""
    told = iter([0.6, 0.8, 0.7, 0.8, 0.99])
    monkeypatch.setattr(finetune, "mean_auroc", lambda scores, labels: next(told))
    tune = FineTune(epochs=9, patience_epochs=2, batch_size=16)
    val = labelled(disc_shards, "val")
    look, heard = Recorded(), []
    tuned = train_classifier(
        make_encoder(), labelled(disc_shards, "train"), val, tune, look, report=heard.append
    )
    assert heard == tuned.validation_auroc == [0.6, 0.8, 0.7, 0.8]
    assert tuned.best == 2
    second = look.weights[1]
    assert all(torch.equal(v, second[k]) for k, v in tuned.model.state_dict().items())
    assert not torch.equal(second["head.weight"], look.weights[3]["head.weight"])
    # Nothing but the validation images was looked at.
    assert all(shards is val.shards for shards in look.shards)


@pytest.fixture
def driven(monkeypatch):
    """A driver without Ray: what the workers are told, and made-up scores of theirs."""
    plans = []

    def fitted(plan, failed, **named):
        plans.append(plan)
        scores = np.random.default_rng(0).normal(size=(2, 24, 1))
        return {
            name: {"scores": one, "best": 1, "validation_auroc": [0.5]}
            for name, one in zip(("pretrained", "untrained"), scores, strict=True)
        }

    monkeypatch.setattr(group, "cluster", lambda workers: nullcontext())
    monkeypatch.setattr(group, "trainer", lambda function, plan, *a, **k: plan)
    monkeypatch.setattr(group, "fitted", fitted)
    return plans


def parts(config):
    embeddings = embed_shards([Pixels()], config.data.shards, size_px=SIZE_PX, loader_workers=0)
    return parts_of(embeddings, config)


def test_workers_are_told_no_label_of_the_test_images(disc_shards, tmp_path, driven):
    config = settings(disc_shards)
    tune = FineTune(batch_size=16)
    found = fine_tune(tmp_path, parts(config), config, tune, seed=0, size_px=SIZE_PX)
    (plan,) = driven
    # In the order in which a worker opens the shards of a split.
    for split in ("train", "val"):
        assert np.array_equal(plan.pop(f"{split}_labels"), labelled(disc_shards, split).labels)
    assert set(plan) == {"settings", "shards", "weights", "seed", "size_px"}
    assert found["epochs"]["pretrained"] == {"best": 1, "validation_auroc": [0.5]}
    scores = np.random.default_rng(0).normal(size=(2, 24, 1))
    test = labelled(disc_shards, "test")
    area = auroc(scores[0][:, 0], test.labels[:, 0])
    assert found["auroc"]["pretrained"]["disc"]["value"] == area
    assert "difference" in found["auroc"]


def test_a_batch_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cannot be shared by workers"):
        FineTune.model_validate({"batch_size": 2, "workers": {"num": 3}})


def test_a_group_that_cannot_grow_takes_no_word_of_when_it_should():
    with pytest.raises(ValueError, match=r"workers.resize_after_s: .* leave it out"):
        FineTune.model_validate({"workers": {"num": 2, "min": 1, "resize_after_s": 5}})
    # What the driver hands to its workers has all keys.
    FineTune.model_validate(FineTune().model_dump())


def test_weights_that_diverge_are_a_sentence(disc_shards):
    tune = FineTune(epochs=2, batch_size=8, learning_rate_per_256=1e30, warmup_epochs=0)
    train, val = labelled(disc_shards, "train"), labelled(disc_shards, "val")
    with pytest.raises(DivergenceError, match="lower fine_tune"):
        train_classifier(make_encoder(), train, val, tune, ALONE)


def train_member(rank, world_size, port, folder, out):
    """One worker of a group without Ray, in float64."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )
    look = Look(Member(rank, world_size, torch.device("cpu")), SIZE_PX, 0)
    tune = FineTune(epochs=2, batch_size=7, learning_rate_per_256=0.02, flip_p=0.3)
    train, val, test = (labelled(folder, split) for split in ("train", "val", "test"))
    # An unknown label: rank shares then have other counts.
    train.labels[::5] = np.nan
    tuned = train_classifier(make_encoder(), train, val, tune, look)
    scores = look(tuned.model, test.shards, tune)
    torch.save(
        {"model": tuned.model.state_dict(), "auroc": tuned.validation_auroc, "scores": scores},
        out / f"{world_size}-{rank}.pt",
    )
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_are_one(disc_shards, tmp_path):
    for world_size in (1, 2):
        run_processes(train_member, (world_size, free_port(), disc_shards, tmp_path), world_size)
    alone, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1")
    )
    assert np.array_equal(first["scores"], second["scores"])
    for other in (first, second):
        assert other["auroc"] == alone["auroc"]
        assert np.abs(other["scores"] - alone["scores"]).max() < 1e-5
        for key, value in alone["model"].items():
            assert torch.allclose(other["model"][key], value, rtol=1e-8, atol=1e-9), key


@pytest.mark.slow
def test_from_an_export_to_all_parts_of_the_result(disc_shards, tmp_path, monkeypatch):
    """Two workers on Ray, relative paths, and the same again."""
    export = tmp_path / "run" / "exports" / "step-00000001"
    save_export(make_encoder(), export, card="a card", known={})
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    config = settings(
        disc_shards,
        fine_tune={
            "epochs": 2,
            "batch_size": 8,
            "learning_rate_per_256": 0.2,
            "workers": {"num": 2},
        },
        segment={"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "width": 8},
        localise=True,
        no_finding=True,
    )
    result, path = evaluate_checkpoint("run/exports/step-00000001", config)
    assert json.loads(path.read_text()) == result
    tuned = result["fine_tune"]
    assert result["classes"] == ["disc", "No Finding"]
    assert 0.5 < tuned["auroc"]["pretrained"]["mean"]["value"] <= 1
    assert [len(one["validation_auroc"]) for one in tuned["epochs"].values()] == [2, 2]
    # With seed 0 this untrained encoder is the one that was exported.
    assert torch.equal(
        untrained(make_encoder(), 0).backbone.gates["0"].spatial.weight,
        make_encoder().backbone.gates["0"].spatial.weight,
    )
    assert tuned["auroc"]["difference"]["mean"] == {"value": 0, "low": 0, "high": 0}
    assert result["segment"]["dice"]["all"]["over_nothing"]["low"] > 0
    lines = summary(result)
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("Fine-tuned as a whole") for line in lines)
    assert any(line.startswith("with a mask ") for line in lines)
    assert any(line.startswith("peak in a box ") for line in lines)


def test_crops_have_a_size():
    with pytest.raises(ValueError, match="crop_scale must be"):
        FineTune(crop_scale=(0.9, 0.5))
    with pytest.raises(ConfigError, match="fine_tune"):
        from mlvicx_dist.config import parse_config

        parse_config(
            {
                "kind": "evaluate",
                "name": "t",
                "data": {"shards": ["x"]},
                "fine_tune": {"epoch": 1},
            },
            "t",
        )


def test_a_group_that_keeps_no_checkpoint_says_that_it_begins_anew(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    callback = Failures(tmp_path / "rows.jsonl", 1, resumes=False)
    callback.after_exception(None, {0: RuntimeError("killed")})
    assert "worker 0 died (killed); beginning anew" in (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(TrainingError) as error:
        callback.after_exception(None, {0: RuntimeError("killed")})
    assert "checkpoint" not in str(error.value)
