"""An evaluation: what is known before its work, what stays of it, whose seed it takes."""

import json

import pytest
import torch
import yaml
from discs import MODEL, settings

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.errors import DataError, DivergenceError, ResourceError
from mlvicx_dist.evaluate import evaluation
from mlvicx_dist.evaluate.evaluation import evaluate_checkpoint
from mlvicx_dist.evaluate.summary import summary
from mlvicx_dist.model.encoder import Encoder, untrained
from mlvicx_dist.model.export_folder import save_export
from mlvicx_dist.model.mlvicx import build_model


@pytest.fixture
def exported(tmp_path):
    """Write an export of which this is known, and give its folder."""

    def write(known):
        folder = tmp_path / "run" / "exports" / "step-00000001"
        encoder = Encoder.from_model(build_model(MODEL, 0), 32).eval()
        save_export(encoder, folder, card="a card", known=known)
        # It lies in a run, of which no more is known.
        (tmp_path / "run" / "config.yaml").touch()
        return folder

    return write


@pytest.fixture
def no_work(monkeypatch):
    """Fail where the work begins."""

    def begun(*arguments, **named):
        pytest.fail("the work was begun")

    monkeypatch.setattr(evaluation, "embed_shards", begun)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    exported, disc_shards, tmp_path, no_work
):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the result cannot be written \(Not a directory\)"):
        evaluate_checkpoint(exported({}), settings(disc_shards), out=tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("tune", "error", "words"),
    [
        ({}, DataError, "batch_size is 64, but the split 'train' has 48 images; lower it"),
        (
            {"batch_size": 8, "workers": {"cpus_per_worker": 9999}},
            ResourceError,
            "asks for 9999 CPUs, but this machine has",
        ),
    ],
)
def test_a_fine_tuning_that_cannot_be_is_told_before_the_work(
    exported, disc_shards, no_work, monkeypatch, tune, error, words
):
    monkeypatch.setattr("mlvicx_dist.train.group.on_cluster", lambda: False)
    with pytest.raises(error, match=words):
        evaluate_checkpoint(exported({}), settings(disc_shards, fine_tune=tune))


def test_what_is_done_stays_when_a_later_part_fails(exported, disc_shards, monkeypatch, tmp_path):
    def fails(*arguments):
        raise DivergenceError("segment: the outputs are not finite.")

    whole = evaluation.segment
    monkeypatch.setattr(evaluation, "segment", fails)
    config = settings(disc_shards, localise=True, segment={"epochs": 1, "width": 8})
    with pytest.raises(DivergenceError):
        evaluate_checkpoint(exported({}), config)
    (path,) = (tmp_path / "run" / "evaluations").iterdir()
    result = json.loads(path.read_text())
    assert result["missing"] == ["segment"]
    lines = summary(result)
    assert any(line.startswith("peak in a box ") for line in lines)
    assert "Not whole: segment not there yet, or the evaluation was stopped." in lines
    monkeypatch.setattr(evaluation, "segment", whole)
    evaluate_checkpoint(tmp_path / "run", config)
    result = json.loads(path.read_text())
    assert "missing" not in result
    assert "segment" in result


@pytest.mark.parametrize("seed", [5, None])
def test_the_untrained_encoder_has_the_seed_that_the_export_tells(
    exported, disc_shards, monkeypatch, seed
):
    made = []

    def kept(encoder, number):
        made.append(untrained(encoder, number))
        return made[0]

    monkeypatch.setattr(evaluation, "untrained", kept)
    known = {} if seed is None else {"training": {"settings": {"train": {"seed": seed}}}}
    folder = exported(known)
    result, _ = evaluate_checkpoint(folder, settings(disc_shards))
    assert result["untrained"] == {"seed": seed or 0, "assumed": seed is None}
    expected = Encoder.from_model(build_model(MODEL, seed or 0), 32).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in made[0].state_dict().items())
    told = any(line.startswith("The export does not tell the seed") for line in summary(result))
    assert told == (seed is None)
    assert max(map(len, summary(result))) <= 100


def test_an_encoder_that_learned_labels_says_so_or_is_refused(
    exported, disc_shards, monkeypatch, tmp_path
):
    def words(result):
        return " ".join(" ".join(summary(result)).split())

    def run_of(splits):
        tree = {
            "kind": "pretrain",
            "method": "supervised",
            "run": {"name": "r"},
            "data": {"shards": [{"path": str(disc_shards)}], "splits": splits},
            "loss": {"label_splits": splits},
        }
        config = to_tree(PretrainConfig.model_validate(tree))
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))

    known = {"method": "supervised", "loss": {"label_splits": ["train"]}, "train": {"seed": 0}}
    folder = exported({"training": {"settings": known}})
    # Whatever is asked of the overlap.
    config = settings(disc_shards, overlap=False)
    run_of(["train"])
    result, _ = evaluate_checkpoint(folder, config)
    found = {"splits": ["train"], "images": 48, "of": 64, "patients_known": True}
    assert result["overlap"]["labels"] == found
    assert "learned the labels of the split train" in words(result)
    (tmp_path / "run" / "config.yaml").write_text("")
    result, _ = evaluate_checkpoint(folder, config)
    assert "whether test patients are among them is unknown" in words(result)
    run_of(["train", "test"])
    monkeypatch.setattr(evaluation, "embed_shards", lambda *a, **k: pytest.fail("begun"))
    with pytest.raises(DataError, match=r"^the split 'test': the encoder learned the labels of 24"):
        evaluate_checkpoint(folder, config)
