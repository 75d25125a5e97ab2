"""The page of results keeps what it is not to change."""

import sys

import pytest
import run


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "RESULTS.md")
    return run.RESULTS


def measure(monkeypatch, name, ratio):
    row = {"name": name, "ours": 1.0, "theirs": ratio, "unit": "s", "ratio": ratio, "limit": 2.0}
    table = f"## {name}\n\n{run.line(row)}\n"
    monkeypatch.setattr(run, "section", lambda name: table)
    monkeypatch.setattr(sys, "argv", ["run.py", name])
    return run.main()


def test_one_benchmark_anew_leaves_the_rest_of_the_page(results, monkeypatch):
    assert measure(monkeypatch, "step", 3.0) == 0
    results.write_text(results.read_text() + "\nBy hand.\n")
    assert measure(monkeypatch, "loader", 5.0) == 0
    assert measure(monkeypatch, "step", 4.0) == 0
    page = results.read_text()
    assert page.count("| step | 1 s | 4 s | 4.00 | 2 |") == 1
    assert page.count("| loader | 1 s | 5 s | 5.00 | 2 |") == 1
    assert "3.00" not in page
    assert page.endswith("By hand.\n")


def test_a_row_below_its_limit_is_marked_and_fails(results, monkeypatch):
    assert measure(monkeypatch, "step", 1.5) == 1
    assert "1.50 (missed)" in results.read_text()


def test_an_unknown_benchmark_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "stepp"])
    with pytest.raises(SystemExit, match="stepp: no such benchmark"):
        run.main()
