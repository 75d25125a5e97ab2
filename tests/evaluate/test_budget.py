"""Equal images and equal time: whose schedule ends when."""

import pytest

from mlvicx_dist.config import Train
from mlvicx_dist.evaluate.budget import equal_time, seconds_a_step
from mlvicx_dist.train.optim import FINAL_SHARE, learning_rate


def test_steps_times_seconds_is_the_references_time():
    seconds = {"mlvicx": 0.3, "vicreg": 0.2, "slow": 0.7, "glacial": 1e4}
    steps = equal_time(1000, seconds, "mlvicx")
    assert steps == {"mlvicx": 1000, "vicreg": 1500, "slow": 428, "glacial": 1}
    for name in ("mlvicx", "vicreg", "slow"):
        # Less than one step is left over.
        assert 0 <= 1000 * 0.3 - steps[name] * seconds[name] + 1e-9 < seconds[name] + 1e-9


def test_a_rate_is_the_median_without_the_first_rows():
    rows = [{"images_per_s": rate} for rate in (1.0, 2.0, 10.0, 20.0, 40.0)]
    assert seconds_a_step(rows, 60) == pytest.approx(3.0)


def test_the_schedule_ends_with_the_steps():
    """Whatever their number is, no matter of whole epochs."""
    train = Train(epochs=5, steps=37, batch_size=256, warmup_epochs=0.5)
    rates = [learning_rate(step, settings=train, steps_per_epoch=10) for step in range(38)]
    assert max(rates) == rates[5] == pytest.approx(train.learning_rate_per_256)
    assert rates[37] == pytest.approx(FINAL_SHARE * train.learning_rate_per_256)
    whole = Train(epochs=5, batch_size=256, warmup_epochs=0.5)
    assert learning_rate(37, settings=whole, steps_per_epoch=10) > 10 * rates[37]
