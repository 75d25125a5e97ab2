"""The space: what may be in it, what a point of it means, and a sentence for each refusal."""

from pathlib import Path

import optuna
import pytest
from small import small_tree

from mlvicx_dist.config import load_config, parse_config
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.tune.space import described, open_space, short

CONFIGS = Path(__file__).parents[2] / "configs" / "sweep"
LOG = {"log_uniform": [0.1, 10]}


def sweep(space, splits=("train",), **others):
    data = {"shards": [{"path": "shards"}], "splits": list(splits)}
    tree = {
        "kind": "sweep",
        "name": "small",
        "pretrain": {"data": data, **small_tree()},
        "space": space,
        **others,
    }
    return parse_config(tree, "sweep.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_files_in_the_repo_are_spaces(path):
    space = open_space(load_config(path))
    study = optuna.create_study()
    for _ in range(20):
        space.config(space.suggest(study.ask()))


def test_a_weight_is_looked_for_only_where_its_level_is_on():
    space = open_space(
        sweep(
            {
                "loss.level_weights.1": LOG,
                "model.levels": {"choice": [[1, 2], [2, 3], "all"]},
                "model.local.fusion": {"choice": ["sum", "per_level"]},
            }
        )
    )
    study, seen = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), set()
    for _ in range(60):
        point = space.suggest(study.ask())
        weighted = "loss.level_weights.1" in point
        levels, fusion = point["model.levels"], point["model.local.fusion"]
        assert weighted == (fusion == "per_level" and levels in ([1, 2], "all"))
        config = space.config(point)
        assert config.loss.level_weights == ({1: point["loss.level_weights.1"]} if weighted else {})
        seen.add((str(levels), fusion))
    assert len(seen) == 6


def test_without_levels_nothing_local_is_looked_for():
    space = open_space(
        sweep(
            {
                "loss.lambda_local": {"choice": [1, 2]},
                "model.local.fusion": {"choice": ["sum", "per_level"]},
                "model.levels": {"choice": [[], [1]]},
            }
        )
    )
    points = space.grid()
    assert len(points) == 5 and {"model.levels": []} in points


def test_draws_are_log_uniform():
    space = open_space(sweep({"loss.lambda_local": {"log_uniform": [1e-2, 1e2]}}))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = [space.suggest(study.ask())["loss.lambda_local"] for _ in range(400)]
    assert 1e-2 <= min(draws) < 0.02 and 50 < max(draws) <= 1e2
    # Half of the mass lies below the geometric mean.
    assert 0.42 < sum(draw < 1 for draw in draws) / 400 < 0.58


def test_a_grid_has_each_point_once():
    space = open_space(
        sweep(
            {
                "model.levels": {"choice": [[1], [2]]},
                "model.local.fusion": {"choice": ["sum", "per_level"]},
                "loss.level_weights.1": {"choice": [0.5, 2.0]},
            }
        )
    )
    # Level 1 has a weight in one of the four pairs.
    points = space.grid()
    assert len(points) == 5
    assert sum("loss.level_weights.1" in point for point in points) == 2


def test_what_another_sweep_tried_is_taken_where_it_fits():
    space = open_space(sweep({"loss.lambda_local": LOG, "model.levels": {"choice": [[1], "all"]}}))
    assert space.admits({"loss.lambda_local": 1.0, "model.levels": "all"})
    assert not space.admits({"loss.lambda_local": 11.0})
    assert not space.admits({"loss.lambda_local": "1.0"})
    assert not space.admits({"model.levels": [2]})
    assert not space.admits({"train.weight_decay": 0.1})


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "space"),
        ({"loss.lamda_local": LOG}, "did you mean 'loss.lambda_local'"),
        ({"loss.global": {"choice": [1]}}, "no such setting"),
        ({"train.epochs": {"choice": [1, 2]}}, "trials must be alike"),
        ({"train.seed": {"choice": [1, 2]}}, "trials must be alike"),
        ({"data.splits": {"choice": [["test"]]}}, "trials must be alike"),
        ({"loss.lambda_local": {"log_uniform": [0, 1]}}, "greater than 0"),
        ({"loss.lambda_local": {"log_uniform": [2, 1]}}, "low < high"),
        ({"loss.lambda_local": {"uniform": [-1, 1]}}, "-1.0 cannot be tried"),
        ({"loss.lambda_local": {"uniform": [0, 1], "choice": [1]}}, "exactly one"),
        ({"loss.lambda_local": {}}, "exactly one"),
        ({"loss.lambda_local": {"choice": []}}, "at least one"),
        ({"loss.lambda_local": {"choice": [1, 1]}}, "each value once"),
        ({"model.local.fusion": {"choice": ["add"]}}, "'add' cannot be tried"),
        ({"loss.lambda_local": {"log_unifrom": [1, 2]}}, "did you mean 'log_uniform'"),
        ({"loss.level_weights.1": LOG}, "never tries"),
        ({"model.projector.width": {"uniform": [8, 32]}}, "give whole numbers as choice"),
        (
            {
                "loss.level_weights.0": LOG,
                "model.local.fusion": {"choice": ["per_level"]},
                "model.levels": {"choice": [[1], [2]]},
            },
            "level 0 is in none of the level sets",
        ),
    ],
)
def test_each_refusal_is_a_sentence(space, words):
    with pytest.raises(ConfigError) as refused:
        open_space(sweep(space))
    assert words in str(refused.value)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("splits", [["train", "test_list"], ["train", "val"]])
def test_trials_are_not_trained_on_what_judges(splits):
    with pytest.raises(ConfigError, match=r"test split|must not train them"):
        sweep({"loss.lambda_local": LOG}, splits=splits)


@pytest.mark.parametrize("target", [{"val": "test"}, {"train": "Test-A"}, {"val": "train"}])
def test_a_sweep_cannot_name_the_test_split(target):
    with pytest.raises(ConfigError, match=r"test split|two splits"):
        sweep({"loss.lambda_local": LOG}, target=target)


def test_a_point_in_words():
    point = {"loss.global.variance": 2.0, "loss.local.variance": 0.12345, "model.levels": [1, 2]}
    assert described(point) == "global.variance 2, local.variance 0.123, levels [1, 2]"
    assert short("model.levels", ["model.levels", "x.levels"]) == "model.levels"
    assert short("loss.level_weights.1", ["loss.level_weights.1"]) == "level_weights.1"
