"""ONNX: PyTorch's numbers for any batch and size, or no file."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from mlvicx_dist.cli import main
from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.export import onnx_file
from mlvicx_dist.export.agreement import difference, phantoms
from mlvicx_dist.export.command import export
from mlvicx_dist.export.onnx_file import Outputs
from mlvicx_dist.train.weights import load_encoder

SIZE = 32


@pytest.fixture(scope="module", params=["resnet18", "convnext_atto"])
def written(request, make_run, tmp_path_factory):
    """A run and its export with an ONNX file, by backbone."""
    folder = tmp_path_factory.mktemp("onnx")
    run = make_run(folder / "run", backbone=request.param)
    return export(run, folder / "e", onnx=True).folder


def agree(folder, images):
    """Whether every output is PyTorch's to 1e-4 of its largest value."""
    encoder = load_encoder(folder)
    with torch.inference_mode():
        expected = Outputs(encoder)(images)
    names, found = onnx_file.run((folder / "encoder.onnx").read_bytes(), images.numpy())
    assert names == ["embedding", *(f"level{k}" for k in range(len(expected) - 1))]
    for name, one, right in zip(names, found, expected, strict=True):
        assert one.shape == right.shape
        assert difference(torch.from_numpy(one), right) <= 1e-4, name


@pytest.mark.slow
def test_it_gives_pytorchs_numbers_for_any_batch_and_size(written):
    agree(written, phantoms(SIZE, count=1))
    agree(written, phantoms(96, count=3))
    agree(written, phantoms(96, count=2)[:, :, :, :70])
    assert "height and width as you like" in (written / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.shared_data
def test_it_gives_pytorchs_numbers_on_real_radiographs(written, shared_data):
    encoder = load_encoder(written)
    paths = sorted((shared_data / "cxr" / "images").glob("nih_*"))[:8]
    images = [encoder.prepare(np.asarray(Image.open(path).convert("L"))) for path in paths]
    agree(written, torch.cat(images))


def test_other_numbers_are_refused(run_dir, tmp_path, monkeypatch):
    encoder = load_encoder(run_dir)

    def slightly_other(data, images):
        with torch.inference_mode():
            outputs = [one.numpy() for one in Outputs(encoder)(torch.from_numpy(images))]
        outputs[2] = outputs[2] + 3e-4 * np.abs(outputs[2]).max()
        return ["embedding", *(f"level{k}" for k in range(len(outputs) - 1))], outputs

    monkeypatch.setattr(onnx_file, "_written", lambda encoder, free: b"")
    monkeypatch.setattr(onnx_file, "run", slightly_other)
    with pytest.raises(CheckpointError, match=r"onnxruntime's level1 differs .* by 3\.0e-04"):
        export(run_dir, tmp_path / "e", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_onnxruntime_cannot_run_is_refused(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "_written", lambda encoder, free: b"no graph")
    assert main(["export", str(run_dir), "--out", str(tmp_path / "e"), "--onnx"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written as ONNX (onnxruntime fails at 32 px" in error
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_one_sentence(run_dir, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch.onnx.errors.OnnxExporterError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "e"), "--onnx"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "test_resnet cannot be written as ONNX (no such operator); export it without" in error
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_fixed_is_said(run_dir, monkeypatch):
    encoder = load_encoder(run_dir)

    def only_fixed(encoder, free):
        if 2 in free:
            raise torch.onnx.errors.OnnxExporterError("the size is fixed")
        return b""

    sizes = []
    monkeypatch.setattr(onnx_file, "_written", only_fixed)
    monkeypatch.setattr(onnx_file, "_wrong", lambda e, d, size: sizes.append(size))
    assert onnx_file.onnx_bytes(encoder) == (b"", False)
    assert sizes == [32]
    assert "height and width 32" in onnx_file.words(encoder, free=False)


def test_without_its_libraries_it_is_one_sentence(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name)
    )
    assert main(["export", str(run_dir), "--out", str(tmp_path / "e"), "--onnx"]) == 2
    assert capsys.readouterr().err == (
        "mlvicx: --onnx: onnxruntime not installed here; install with "
        "pip install 'mlvicx_dist[onnx]', or export without it.\n"
    )
