"""Phantoms: seeded, independent findings, some as DICOM, all readable by the folder source."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.ingest.pixels import read_image
from mlvicx_dist.ingest.sources.anatomy import CLASSES, draw_phantom
from mlvicx_dist.ingest.sources.phantom import write_phantoms


def test_the_same_patient_is_drawn_the_same():
    first, again = draw_phantom(1, 2, size_px=48), draw_phantom(1, 2, size_px=48)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.labels == again.labels
    assert not np.array_equal(first.pixels, draw_phantom(1, 3, size_px=48).pixels)


def test_findings_are_common_and_independent():
    labels = np.array([list(draw_phantom(0, i, size_px=16).labels.values()) for i in range(600)])
    assert ((labels.mean(0) > 0.28) & (labels.mean(0) < 0.42)).all()
    correlation = np.corrcoef(labels.T)[np.triu_indices(len(CLASSES), 1)]
    assert np.abs(correlation).max() < 0.13


def test_the_lungs_are_darker_than_the_spine_and_the_heart():
    pictures = [draw_phantom(0, i, size_px=64).pixels.astype(float) for i in range(40)]
    mean = np.mean(pictures, 0)
    assert mean[15:28, 14:22].mean() < 0.7 * mean[15:40, 30:34].mean()


def test_files_are_resumed_and_dicom_reads_as_drawn(phantom_files, phantom_records, tmp_path):
    dicom = sorted((phantom_files / "dicom").glob("*.dcm"))
    assert 8 <= len(dicom) <= 16
    for path in dicom[:4]:
        drawn = draw_phantom(0, int(path.stem[-6:]), size_px=64).pixels
        read = np.asarray(read_image(io.BytesIO(path.read_bytes()), bits=16)[0]) / 65535
        assert np.abs(read - drawn / 4095).max() < 2e-3
    before = {p: p.stat().st_mtime_ns for p in phantom_files.rglob("*.png")}
    write_phantoms(phantom_files, 60, size_px=64)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_phantoms_of_another_population_are_not_kept_under_these_labels(tmp_path):
    write_phantoms(tmp_path, 2, size_px=32)
    first = (tmp_path / "labels.csv").read_bytes()
    write_phantoms(tmp_path, 3, size_px=32)
    assert (tmp_path / "labels.csv").read_bytes().startswith(first.rstrip())
    for changes in ({"seed": 1}, {"size_px": 48}):
        with pytest.raises(DataError, match="phantoms of another seed, size or DICOM fraction"):
            write_phantoms(tmp_path, 2, **{"size_px": 32, **changes})
    for changes in ({"seed": -1}, {"size_px": 0}, {"dicom_fraction": float("nan")}):
        with pytest.raises(ConfigError, match="phantoms: count 2"):
            write_phantoms(tmp_path / "new", 2, **changes)


SCRIPT = str(Path(__file__).parents[2] / "sharding" / "shard_phantom.py")


def test_phantoms_are_drawn_beside_their_shards(tmp_path):
    # A shell completes the name of a folder with a slash.
    (tmp_path / "shards").mkdir()
    command = [sys.executable, SCRIPT, "--count", "2", "--size-px", "64", "--workers", "1"]
    command += ["--out", "shards/"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shards-images" / "labels.csv").exists()
    assert not (tmp_path / "shards" / "-images").exists()


def test_phantoms_are_not_drawn_into_a_store(tmp_path):
    command = [sys.executable, SCRIPT, "--count", "2", "--workers", "1"]
    command += ["--source", "http://127.0.0.1:9/drawn", "--out", "shards"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "9/drawn: phantoms are drawn into a folder of this machine; give one" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
