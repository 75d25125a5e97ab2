"""The machines of a module, where they can be made."""

import pytest
from machines import Lan, missing


@pytest.fixture(scope="module")
def lan(phantom_shards):
    if reason := missing():
        pytest.skip(reason)
    own = Lan(phantom_shards)
    try:
        yield own
    finally:
        own.end()
