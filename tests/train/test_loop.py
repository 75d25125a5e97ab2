"""What the loop tells of itself."""

import pytest
import torch
from group import settings

from mlvicx_dist.config import parse_config
from mlvicx_dist.train.loop import train
from mlvicx_dist.train.notices import NoNotices
from mlvicx_dist.train.step import Member


@pytest.mark.parametrize(
    ("precision", "supported", "said"),
    [("bf16", False, True), ("bf16", True, False), ("float32", False, False)],
)
def test_bf16_in_software_is_told_at_the_start(
    phantom_shards, tmp_path, monkeypatch, precision, supported, said
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    tree = settings(phantom_shards, tmp_path, train__epochs=1, train__precision=precision)
    (tmp_path / "small").mkdir()
    first = []

    def enough(row):
        first.append(row)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(
            parse_config(tree, "test"),
            tmp_path / "small",
            Member(0, 1, torch.device("cpu")),
            report=enough,
            notices=NoNotices(),
        )
    assert any("train.precision=float32" in words for words in first[0]["said"]) == said
