"""DICOM: air dark and bone bright, whatever the file says."""

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    generate_uid,
)

from mlvicx_dist.ingest.dicom import read_grey
from mlvicx_dist.ingest.refused import Refused

RAMP = (np.arange(64 * 64).reshape(64, 64) % 4096).astype(np.uint16)


def write(path, pixels=RAMP, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, int(pixels.dtype == np.int16)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    if dataset.get("PixelData") != pixels.tobytes() and "PixelData" in dataset:
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=False)
    return path


def test_twelve_bits_in_sixteen_fill_the_range(tmp_path):
    path = write(tmp_path / "a.dcm", WindowCenter="2048", WindowWidth="4096")
    for bits, top in ((8, 255), (16, 65535)):
        grey = read_grey(path, bits)
        assert grey.min() == 0
        assert grey.max() == top
        assert np.abs(grey / top - RAMP / 4095).max() < 1 / 200


@pytest.mark.parametrize("window", [{}, {"WindowCenter": "2048", "WindowWidth": "4096"}])
def test_monochrome1_is_the_inverse_of_monochrome2(tmp_path, window):
    second = read_grey(write(tmp_path / "2.dcm", **window), 16)
    first = read_grey(
        write(tmp_path / "1.dcm", PhotometricInterpretation="MONOCHROME1", **window), 16
    )
    assert np.abs(first.astype(int) + second - 65535).max() <= 1


def test_presentation_lut_shape_inverse_inverts_once(tmp_path):
    plain = read_grey(write(tmp_path / "p.dcm"))
    inverse = read_grey(write(tmp_path / "i.dcm", PresentationLUTShape="INVERSE"))
    both = read_grey(
        write(
            tmp_path / "b.dcm",
            PresentationLUTShape="INVERSE",
            PhotometricInterpretation="MONOCHROME1",
        )
    )
    assert np.abs(inverse.astype(int) + plain - 255).max() <= 1
    assert np.array_equal(both, inverse)


def test_rescale_and_window_are_applied_in_that_order(tmp_path):
    path = write(
        tmp_path / "r.dcm",
        RescaleSlope="2",
        RescaleIntercept="-1000",
        WindowCenter="1000",
        WindowWidth="1000",
    )
    value = RAMP.astype(float) * 2 - 1000
    expected = np.clip((value - (1000 - 0.5)) / (1000 - 1) + 0.5, 0, 1)
    assert np.abs(read_grey(path, 16) / 65535 - expected).max() < 2e-3


def test_signed_pixels(tmp_path):
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    grey = read_grey(write(tmp_path / "s.dcm", pixels=signed))
    assert np.abs(grey.astype(int) - read_grey(write(tmp_path / "u.dcm"))).max() <= 1


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"PixelData": None}, "no-pixels"),
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"SamplesPerPixel": 3}, "not-grey"),
        ({"Rows": 60000, "Columns": 60000}, "size"),
        ({"syntax": JPEG2000Lossless, "PixelData": encapsulate([b"0" * 16])}, "compressed"),
    ],
)
def test_what_is_no_single_grey_image_is_refused_by_its_header(tmp_path, tags, code):
    with pytest.raises(Refused) as caught:
        read_grey(write(tmp_path / "x.dcm", **tags))
    assert caught.value.code == code


def test_garbage_is_refused(tmp_path):
    (tmp_path / "g.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)))
    with pytest.raises(Refused):
        read_grey(tmp_path / "g.dcm")


@pytest.mark.shared_data
def test_real_uncompressed_files(shared_data):
    grey = read_grey(shared_data / "dicom" / "nema_rg1_chest_explicit_uncompressed.dcm")
    height, width = grey.shape
    assert min(height, width) > 500
    assert grey.std() > 20
