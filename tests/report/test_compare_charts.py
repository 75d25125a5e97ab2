"""What the charts of a comparison draw."""

import json

import pytest

from mlvicx_dist.report.compare_charts import _few


def test_a_bar_of_label_efficiency_ends_where_its_interval_does():
    """One that ends at an area of 1 reaches further down than up."""
    cell = {"value": 0.97, "low": 0.90, "high": 1.0}
    chart = _few([{"fraction": 0.1, "methods": {"mlvicx": cell}}, {"fraction": 1.0}])
    (trace,) = json.loads(chart["figure"])["data"]
    bar = trace["error_y"]
    assert bar["symmetric"] is False
    assert trace["y"][0] + bar["array"][0] == pytest.approx(1.0)
    assert trace["y"][0] - bar["arrayminus"][0] == pytest.approx(0.90)
