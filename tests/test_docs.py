"""What the pages name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_tests_that_a_page_names_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "name",
    ["resume.md", "distributed.md", "sweeps.md", "evaluation.md", "export.md", "security.md"],
)
def test_each_guarantee_names_its_test(name):
    text = (ROOT / "docs" / name).read_text()
    guaranteed = text.split("## What is guaranteed")[1].split("\n## ")[0]
    items = re.split(r"\n- ", guaranteed)[1:]
    assert len(items) >= 5
    for item in items:
        assert re.search(r"`(tests|benchmarks)/", item), item
