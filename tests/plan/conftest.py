"""What the tests of plans share."""

import pytest
import yaml
from group import settings

from mlvicx_dist.config import parse_config


def tree(shards, runs, changes):
    """Small settings in float32, without gates, which are half of the operations."""
    return settings(shards, runs, **{"model__context": False, **changes})


@pytest.fixture
def config(tmp_path):
    """`config(train__batch_size=8)` makes settings."""

    def made(shards="nowhere", **changes):
        return parse_config(tree(shards, tmp_path, changes), "the test")

    return made


@pytest.fixture
def file(tmp_path):
    """The same as a file."""

    def made(shards="nowhere", **changes):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(tree(shards, tmp_path, changes)))
        return str(path)

    return made
