"""What a method of a comparison may change, and what it then is."""

from pathlib import Path

import pytest
from small import small_tree

from mlvicx_dist.config import CompareConfig, load_as, parse_config
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.evaluate.methods import methods_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "compare").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_methods_of_every_shipped_file_are_allowed(path):
    methods = methods_of(load_as(CompareConfig, path))
    assert methods[0].name == "mlvicx" and methods[0].changes == {"method": "mlvicx"}
    # No two of them are the same.
    assert len({(m.floor, m.settings.model_dump_json()) for m in methods}) == len(methods)


def settings(methods, **changes):
    pretrain = {"data": {"shards": [{"path": "x"}]}, **small_tree(), **changes.pop("pretrain", {})}
    tree = {
        "kind": "compare",
        "name": "t",
        "pretrain": pretrain,
        "methods": methods,
        "tasks": [{"name": "one", "data": {"shards": ["y"]}}],
    }
    config = parse_config(tree | changes, "t.yaml")
    assert isinstance(config, CompareConfig)
    return config


def of(methods, **changes):
    return {method.name: method for method in methods_of(settings(methods, **changes))}


def test_a_name_is_the_method_that_it_means():
    found = of({"mlvicx": {}, "vicreg": {}, "simsiam": {}, "untrained": {}, "pixels": {}})
    assert found["mlvicx"].settings.model.levels == "all" and found["mlvicx"].floor is None
    vicreg = found["vicreg"].settings
    assert (vicreg.method, vicreg.model.levels, vicreg.model.context) == ("vicreg", [], False)
    assert found["simsiam"].settings.model.predictor_width == 512
    assert (found["untrained"].floor, found["pixels"].floor) == ("untrained", "pixels")
    assert found["untrained"].settings.model == found["mlvicx"].settings.model
    # All else is the common block's.
    assert vicreg.views == found["mlvicx"].settings.views
    assert vicreg.train == found["mlvicx"].settings.train


def test_what_a_baseline_does_not_read_is_not_in_its_way():
    common = {"loss": {"lambda_local": 2.0}, "method": "mlvicx"}
    found = of({"mlvicx": {}, "simclr": {"loss.temperature": 0.2}}, pretrain=common)
    assert found["mlvicx"].settings.loss.lambda_local == 2.0
    assert found["simclr"].settings.loss.temperature == 0.2


def test_ablations_are_dotted_or_nested_changes():
    found = of(
        {
            "mlvicx": {},
            "no_context": {"model.context": False},
            "per_level": {"model": {"local": {"fusion": "per_level"}}, "model.levels": [3, 4]},
            "bare": {"method": "untrained", "model.context": False},
        }
    )
    assert not found["no_context"].settings.model.context
    per_level = found["per_level"].settings.model
    assert (per_level.local.fusion, per_level.levels) == ("per_level", [3, 4])
    # What nested keys do not name stays.
    assert per_level.local.channels == found["mlvicx"].settings.model.local.channels
    assert found["bare"].floor == "untrained" and not found["bare"].settings.model.context


def test_a_run_has_its_seed_and_length():
    method = of({"mlvicx": {}})["mlvicx"]
    config = method.at(7, "/runs", steps=11)
    assert (config.run.name, config.run.storage_path) == ("mlvicx-seed-7", "/runs")
    assert (config.train.seed, config.train.total_steps(5)) == (7, 11)
    assert method.at(7, "/runs").train.total_steps(5) == 5 * config.train.epochs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"a": {"model.contxt": False}}}, "methods.a: the key 'model.contxt' does not"),
        ({"methods": {"a": {"method": "vicerg"}}}, r"'vicerg', but must .*did you mean 'vicreg'"),
        ({"methods": {"vicreg": {"method": "simclr"}}}, "vicreg is given the method simclr"),
        ({"methods": {"a": {"data.splits": ["val"]}}}, "a changes data.splits, but all methods"),
        ({"methods": {"a": {"train.epochs": 3}}}, "a changes train.epochs, but all methods"),
        ({"methods": {"a": {"train.seed": 3}}}, "a changes train.seed, but all methods"),
        ({"methods": {"a": {"views.image_size_px": 64}}}, "a changes views.image_size_px"),
        ({"methods": {"a": {"bootstrap.draws": 64}}}, "a changes bootstrap.draws, but all"),
        ({"methods": {"pixels": {"model.context": False}}}, "no effect on pixels"),
        ({"methods": {"untrained": {"loss.lambda_local": 2}}}, "no effect on untrained"),
        ({"methods": {"vicreg": {"model.levels": [4]}}}, "methods.vicreg: method vicreg has no"),
        ({"seeds": [0, 1, 0]}, "seeds names one twice"),
        ({"reference": "vicerg"}, "reference is 'vicerg', which is no method here"),
        ({"reference": "pixels", "budget": "time"}, "needs a reference that is trained"),
        ({"tasks": [{"name": "a", "data": {"shards": ["y"]}}] * 2}, "two tasks have one name"),
        *(
            ({"tasks": [{"name": "a", "data": {"shards": ["y"]}, **more}]}, f"{key} is no part of")
            for key, more in [
                ("fine_tune", {"fine_tune": {}}),
                ("segment", {"segment": {}}),
                ("localise", {"localise": True}),
                ("knn", {"knn": {"neighbours": 5}}),
            ]
        ),
    ],
)
def test_mistakes_are_one_sentence(changes, words):
    methods = changes.pop("methods", {"mlvicx": {}, "vicreg": {}, "pixels": {}})
    with pytest.raises(ConfigError, match=words) as caught:
        methods_of(settings(methods, **changes))
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")
