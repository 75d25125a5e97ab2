"""What the loop tells of itself."""

import pytest
import torch
from group import settings

from mlvicx_dist.config import parse_config
from mlvicx_dist.train.loop import train
from mlvicx_dist.train.notices import NoNotices
from mlvicx_dist.train.step import Member


def said_at_the_start(shards, folder, **changes):
    """What rank 0 of one worker tells before its first step."""
    (folder / "small").mkdir()
    first = []

    def enough(row):
        first.append(row)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(
            parse_config(settings(shards, folder, train__epochs=1, **changes), "test"),
            folder / "small",
            Member(0, 1, torch.device("cpu")),
            report=enough,
            notices=NoNotices(),
        )
    return " ".join(first[0]["said"])


@pytest.mark.parametrize(
    ("precision", "supported", "said"),
    [("bf16", False, True), ("bf16", True, False), ("float32", False, False)],
)
def test_bf16_in_software_is_told_at_the_start(
    phantom_shards, tmp_path, monkeypatch, precision, supported, said
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    words = said_at_the_start(phantom_shards, tmp_path, train__precision=precision)
    assert ("train.precision=float32" in words) == said


@pytest.mark.parametrize("gradients", ["float32", "bf16"])
def test_a_worker_without_others_says_that_it_exchanges_nothing(
    phantom_shards, tmp_path, gradients
):
    words = said_at_the_start(phantom_shards, tmp_path, train__gradients=gradients)
    assert ("train.gradients has no effect" in words) == (gradients == "bf16")
