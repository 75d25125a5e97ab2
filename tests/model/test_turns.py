"""Two forwards by turns: what one waits for travels while the other computes."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_dist.config import LocalHead, Model, Projector
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.model.turns import by_turns, rest
from mlvicx_dist.objective import batch_norm
from mlvicx_dist.objective.batch_norm import convert_batch_norm
from mlvicx_dist.train.step import TwoViews


def test_calls_alternate_where_they_rest():
    said = []

    def count(name):
        for number in range(2 if name == "a" else 3):
            said.append(f"{name}{number}")
            rest()
        return name.upper()

    assert by_turns(count, "a", "b") == ["A", "B"]
    assert said == ["a0", "b0", "a1", "b1", "b2"]


def test_alone_nothing_rests():
    rest()
    assert by_turns(lambda x: x + 1, 1) == [2]


def test_an_error_of_one_is_raised_and_the_other_is_not_gone_on_with():
    done = []

    def call(x):
        rest()
        if x == 0:
            raise ValueError("the first")
        done.append(x)

    with pytest.raises(ValueError, match="the first"):
        by_turns(call, 0, 1)
    assert done == []


def waits(events):
    """Of each exchange, how many others began between its beginning and the wait for it."""
    begun = {name: k for k, (word, name) in enumerate(events) if word == "begin"}
    return [
        sum(word == "begin" for word, _ in events[begun[name] + 1 : k])
        for k, (word, name) in enumerate(events)
        if word == "wait"
    ]


@pytest.fixture
def exchanges(monkeypatch):
    """What norms send and wait for, in order."""
    events = []

    def watched(begin):
        def begun(own):
            name = len(events)
            events.append(("begin", name))
            wait = begin(own)

            def waited():
                events.append(("wait", name))
                return wait()

            return waited

        return begun

    for name in ("_gather_begun", "_sum_begun"):
        monkeypatch.setattr(batch_norm, name, watched(getattr(batch_norm, name)))
    return events


def test_a_layer_of_one_view_is_computed_while_the_sums_of_the_other_travel(exchanges):
    model = build_model(
        Model(
            backbone="test_resnet",
            local=LocalHead(resize_px=8, channels=4, pool=2),
            projector=Projector(width=12),
        ),
        0,
    )
    convert_batch_norm(model, torch.device("cpu"))
    encoder, heads = (
        sum(isinstance(m, _BatchNorm) for m in part.modules())
        for part in (
            model.encoder,
            nn.ModuleList([model.global_projector, model.local_projectors]),
        )
    )
    # But for the last norm of view 2, beside which nothing of view 1 is left. A projector's linear
    # layers take both views at once, so that there only what a norm does itself goes by turns.
    in_encoder, in_heads = [1] * (2 * encoder - 1) + [0], [1, 0] * heads
    first, second, _ = TwoViews(model)(*torch.randn(2, 4, 1, 32, 32))
    assert waits(exchanges) == in_encoder + in_heads
    exchanges.clear()
    sum(x.square().mean() for view in (first, second) for x in view.values()).backward()
    assert waits(exchanges) == in_heads + in_encoder
