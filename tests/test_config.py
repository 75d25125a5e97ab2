"""Settings: what is read, and the sentence for whatever is wrong."""

from pathlib import Path

import pytest

from mlvicx_dist.config import (
    CompareConfig,
    EvaluateConfig,
    PretrainConfig,
    SweepConfig,
    load_as,
    load_config,
    parse_config,
    to_tree,
)
from mlvicx_dist.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "kind: pretrain\nrun: {name: small}\ndata: {shards: [{path: a}]}\n"
        "train: {weight_decay: 1e-6, learning_rate_per_256: 2E-1}\n"
    )
    return path


def test_numbers_with_an_exponent_are_numbers(file):
    config = load_config(file)
    assert config.train.weight_decay == 1e-6
    assert config.train.learning_rate_per_256 == 0.2


def test_numbers_and_truths_are_those_of_yaml_1_2(file):
    assert load_config(file, ["train.epochs=010"]).train.epochs == 10
    for words in ("train.seed=1:30", "train.epochs=yes", "train.seed=0x1f"):
        with pytest.raises(ConfigError, match=words.partition("=")[0]):
            load_config(file, [words])
    assert load_config(file, ["train.recompute=true"]).train.recompute


def test_overrides_reach_lists_and_make_sections(file):
    config = load_config(
        file,
        [
            "data.shards.0.weight=2.5",
            "loss.global.variance=1e1",
            "model.levels=[1, 3]",
            "run.name=other",
        ],
    )
    assert config.data.shards[0].weight == 2.5
    assert config.loss.global_.variance == 10
    assert config.model.levels == [1, 3]
    assert config.run.name == "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.levls=all", ["small.yaml", "model.levls", "'levels'"]),
        ("train.optimizer=sgd", ["small.yaml", "train.optimizer", "lars, adamw"]),
        ("model.levels=[1, a]", ["model.levels", "'all' or a list"]),
        ("model.levels=[1, 1]", ["'model'", "each level once"]),
        ("loss.global.variance=-1", ["loss.global.variance", "greater than or equal to 0"]),
        ("data.shards.0.wieght=2", ["data.shards.0.wieght", "'weight'"]),
        ("data.shards.3.path=b", ["--set data.shards.3.path=b", "0 to 0"]),
        ("train.epochs", ["--set train.epochs", "train.epochs=10"]),
        ("train.epochs.x=1", ["--set"]),
        ("views.crop_scale=[1.0, 0.2]", ["views", "low <= high"]),
        ("kind=pretain", ["kind", "'pretrain'"]),
        ("workers.min=5", ["workers", "min must not be more"]),
        ("data.shards[0].path=b", ["'data.shards[0]' does not exist", "'shards'"]),
        ("data.shards.²=b", ["0 to 0"]),
        ("list=1", ["'list' does not exist"]),
        ("kind=[pretrain]", ["'kind' is ['pretrain']", "pretrain, evaluate"]),
        ("method=[vicreg]", ["'method' is", "simclr"]),
    ],
)
def test_a_mistake_is_one_sentence(file, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [*(["train.epochs=3"] if "epochs.x" in override else []), override])
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: pretrain\nrun: {name: x\n", "line"),
        ("- a\n", "mapping"),
        ("kind: pretrain\nkind: evaluate\n", "stands twice"),
        ("kind: pretrain\nrun: {name: x}\n", "'data' is missing"),
        ("kind: !!python/object/apply:os.system ['exit 1']\n", "could not determine a constructor"),
        ("kind: !!python/name:os.system\n", "could not determine a constructor"),
        ("? [a]\n: b\n", "line 1: a key is a word"),
        ("kind: !!int x\n", "it is not YAML"),
        ("kind: 2026-13-45\n", "it is not YAML"),
        ("\0", "it is not YAML"),
        ("[" * 1000, "it is not YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "..", ".x", "a\n", "~x", "<b>", ""])
def test_a_name_is_no_way_to_another_folder(name):
    tree = {"kind": "pretrain", "run": {"name": name}, "data": {"shards": [{"path": "x"}]}}
    with pytest.raises(ConfigError, match=r"run\.name"):
        parse_config(tree, "t")


def test_a_value_that_would_be_endless_is_not_written_out():
    """Ten lists, each ten times the one before."""
    value = ["x"] * 10
    for _ in range(9):
        value = [value] * 10
    tree = {"kind": "pretrain", "run": {"name": value}, "data": {"shards": [{"path": "x"}]}}
    with pytest.raises(ConfigError, match=r"'run\.name' is 'list'"):
        parse_config(tree, "t")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothere\.yaml"):
        load_config(tmp_path / "nothere.yaml")


def test_a_tree_comes_back_as_the_same_settings(file):
    config = load_config(file)
    tree = to_tree(config)
    assert tree["loss"]["global"]["invariance"] == 25
    assert parse_config(tree, "again") == config


def test_the_wrong_kind_is_refused(file):
    with pytest.raises(ConfigError, match="kind: evaluate"):
        load_as(EvaluateConfig, file)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_says_its_command(path):
    config = load_config(path)
    assert isinstance(config, PretrainConfig | EvaluateConfig | SweepConfig | CompareConfig)
    head = path.read_text().split("kind:")[0]
    assert "Command:" in head
    assert path.relative_to(ROOT).as_posix() in head
