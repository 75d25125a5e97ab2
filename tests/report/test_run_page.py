"""The page of a run whose files or shards are not what they were."""

import json
import shutil

import pytest
from folders import run_folder

from mlvicx_dist.errors import DataError
from mlvicx_dist.report.page import write_report


@pytest.fixture(scope="module")
def whole(phantom_shards, tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("page") / "small", phantom_shards)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "small")


def test_why_no_images_are_shown_is_said(run, phantom_shards):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(phantom_shards), "/nowhere"))
    page = write_report(run).read_text()
    assert "No images can be shown: /nowhere: there is no such folder of shards" in page


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"probe": 1}'])
@pytest.mark.parametrize("name", ["evaluations/phantoms.json", "state.json", "environment.json"])
def test_a_damaged_file_is_one_sentence(run, name, content):
    (run / name).write_text(content)
    if content.startswith("{") and content.endswith("}") and "/" not in name:
        # Whatever is not told is not shown.
        assert write_report(run).exists()
        return
    with pytest.raises(DataError, match=r"json: the file is damaged; \w.*\.$"):
        write_report(run)


@pytest.mark.parametrize("content", ["", "kind: sweep", "- a", "{"])
def test_damaged_settings_are_one_sentence(run, content):
    (run / "config.yaml").write_text(content)
    with pytest.raises(DataError, match=r"the run's settings cannot be read \(.*\); restore the"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1}\n'),
        ("environment.json", '{"versions": "x"}'),
        ("evaluations/phantoms.json", None),
    ],
)
def test_a_file_of_other_values_is_one_sentence(run, name, content):
    path = run / name
    if content is None:
        result = json.loads(path.read_text())
        del result["splits"]
        content = json.dumps(result)
    path.write_text(content)
    with pytest.raises(
        DataError, match=r"small: a file in it is not as it was written \(\w+: .*\);"
    ):
        write_report(run)
