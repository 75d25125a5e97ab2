"""DICOM: air dark and bone bright, whatever the file says."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from mlvicx_dist.ingest.dicom import read_grey, read_header, read_radiograph
from mlvicx_dist.ingest.dicom_header import Header, Rules
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


def good_bytes():
    buffer = io.BytesIO()
    write(buffer, RAMP[:16, :16].copy(), Modality="DX", WindowCenter="2048", WindowWidth="4096")
    return buffer.getvalue()


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


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"PixelData": None}, "no-pixels"),
        ({"NumberOfFrames": 3}, "multi-frame"),
        ({"SamplesPerPixel": 4}, "not-grey"),
        ({"Rows": 60000, "Columns": 60000}, "size"),
        ({"Rows": 0}, "no-pixels"),
        ({"Rows": 128}, "undecodable"),
        ({"syntax": JPEG2000Lossless, "PixelData": encapsulate([b"0" * 16])}, "undecodable"),
        ({"syntax": HTJ2KLossless, "PixelData": encapsulate([b"0" * 16])}, "no-decoder"),
    ],
)
def test_what_is_no_single_image_is_refused(tmp_path, tags, code):
    with pytest.raises(Refused) as caught:
        read_grey(write(tmp_path / "x.dcm", **tags))
    assert caught.value.code == code
    assert "\n" not in caught.value.detail


@pytest.mark.parametrize(
    ("tags", "code", "allowed"),
    [
        ({"Modality": "CT"}, "modality", {"modalities": ()}),
        ({"BodyPartExamined": "HAND"}, "body-part", {"body_parts": ()}),
        ({"ViewPosition": "LL"}, "lateral", {"lateral": True}),
        ({"SeriesDescription": "CHEST LAT"}, "lateral", {"lateral": True}),
        ({"PresentationIntentType": "FOR PROCESSING"}, "for-processing", {"for_processing": True}),
        ({"BurnedInAnnotation": "YES"}, "burned-in", {"burned_in": True}),
    ],
)
def test_what_is_no_frontal_chest_radiograph_is_refused_by_its_header(
    tmp_path, tags, code, allowed
):
    data = write(tmp_path / "x.dcm", **tags).read_bytes()
    with pytest.raises(Refused) as caught:
        read_radiograph(io.BytesIO(data), bits=8, rules=Rules())
    assert caught.value.code == code
    pixels, _ = read_radiograph(io.BytesIO(data), bits=8, rules=Rules(**allowed))
    assert pixels.shape == RAMP.shape


@pytest.mark.parametrize(
    "tags",
    [
        {"Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "PA"},
        {"Modality": "CR", "SeriesDescription": "Chest PA, no contralateral"},
        {},
    ],
)
def test_a_frontal_chest_radiograph_is_taken(tmp_path, tags):
    with write(tmp_path / "x.dcm", **tags).open("rb") as file:
        read_radiograph(file, bits=8, rules=Rules())


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_the_header_tells_patient_view_sex_and_age(tmp_path):
    tags = {"PatientID": "p 1", "ViewPosition": "ap", "PatientSex": "F", "PatientAge": "018M"}
    assert read_header(write(tmp_path / "x.dcm", **tags)) == Header("p 1", None, "AP", "F", 1)
    study = write(tmp_path / "y.dcm", PatientID="", StudyInstanceUID="1.2.3", PatientAge="old")
    assert read_header(study) == Header(None, "1.2.3")
    (tmp_path / "z.dcm").write_bytes(b"no DICOM")
    assert read_header(tmp_path / "z.dcm") is None


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_uncompressed_syntax_gives_the_same_pixels(tmp_path, syntax):
    plain = write(tmp_path / "p.dcm")
    dataset = pydicom.dcmread(plain)
    pixels = RAMP.astype(">u2") if syntax == ExplicitVRBigEndian else RAMP
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(
        tmp_path / "o.dcm",
        dataset,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
        force_encoding=True,
    )
    assert np.array_equal(read_grey(tmp_path / "o.dcm"), read_grey(plain))


def jpeg_lossless(pixels):
    return imagecodecs.jpeg_encode(pixels, lossless=True, bitspersample=12)


@pytest.mark.parametrize(
    ("syntax", "encode", "tolerance"),
    [
        (JPEGLosslessSV1, jpeg_lossless, 0),
        (JPEGLossless, jpeg_lossless, 0),
        (JPEGExtended12Bit, lambda x: imagecodecs.jpeg_encode(x, level=99, bitspersample=12), 2),
        (JPEGLSLossless, imagecodecs.jpegls_encode, 0),
        (JPEG2000Lossless, lambda x: imagecodecs.jpeg2k_encode(x, codecformat="j2k"), 0),
        (RLELossless, None, 0),
    ],
)
def test_every_compressed_syntax_gives_the_pixels(tmp_path, syntax, encode, tolerance):
    smooth = (np.add.outer(np.arange(64), np.arange(64)) * 32).astype(np.uint16)
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    plain = write(tmp_path / "p.dcm", pixels=smooth, **window)
    if encode is None:
        dataset = pydicom.dcmread(plain)
        dataset.compress(syntax)
        dataset.save_as(tmp_path / "c.dcm")
    else:
        frame = encapsulate([encode(smooth)])
        write(tmp_path / "c.dcm", pixels=smooth, syntax=syntax, PixelData=frame, **window)
    difference = np.abs(
        read_grey(tmp_path / "c.dcm", 16).astype(int) - read_grey(plain, 16).astype(int)
    )
    assert difference.max() <= tolerance * 16


def test_eight_bit_jpeg_and_a_colour_picture(tmp_path):
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    frame = encapsulate([imagecodecs.jpeg8_encode(grey, level=99)])
    path = write(tmp_path / "j.dcm", pixels=grey, syntax=JPEGBaseline8Bit, PixelData=frame, **eight)
    assert np.abs(np.diff(read_grey(path).astype(int).mean(1))).max() < 8
    for planar in (0, 1):
        rgb = np.stack([grey, 255 - grey, grey // 2], 2)
        data = rgb.transpose(2, 0, 1) if planar else rgb
        path = write(
            tmp_path / "c.dcm",
            pixels=grey,
            PixelData=np.ascontiguousarray(data).tobytes(),
            SamplesPerPixel=3,
            PlanarConfiguration=planar,
            PhotometricInterpretation="RGB",
            **eight,
        )
        luma = rgb @ np.array([0.299, 0.587, 0.114])
        assert np.abs(read_grey(path) - luma).max() <= 0.5001


def test_a_palette_is_looked_up(tmp_path):
    indices = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    table = np.arange(256, dtype=np.uint16)[::-1] * 257
    tags = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    path = write(
        tmp_path / "p.dcm", pixels=indices, PhotometricInterpretation="PALETTE COLOR", **tags
    )
    assert np.abs(read_grey(path).astype(int) - (255 - indices.astype(int))).max() <= 1


def lut(values, first, bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "OW", np.asarray(values, np.uint16).tobytes())
    return Sequence([item])


def test_a_modality_lut_sequence_is_applied(tmp_path):
    path = write(tmp_path / "m.dcm", ModalityLUTSequence=lut(4095 - np.arange(4096), 0, 16))
    plain = read_grey(write(tmp_path / "p.dcm"))
    assert np.abs(read_grey(path).astype(int) - (255 - plain.astype(int))).max() <= 1


def test_a_voi_lut_sequence_is_applied_and_the_second_by_choice(tmp_path):
    ramp = np.arange(4096) // 16
    luts = Sequence([*lut(ramp, 0, 8), *lut(255 - ramp, 0, 8)])
    data = write(tmp_path / "v.dcm", VOILUTSequence=luts).read_bytes()
    first, _ = read_radiograph(io.BytesIO(data), bits=8, rules=Rules())
    second, _ = read_radiograph(io.BytesIO(data), bits=8, rules=Rules(window=1))
    assert np.array_equal(first, RAMP // 16)
    assert np.array_equal(second, 255 - RAMP // 16)


def test_the_window_is_chosen_and_one_that_cannot_be_is_left_out(tmp_path):
    two = {"WindowCenter": ["2048", "1024"], "WindowWidth": ["4096", "2048"]}
    data = write(tmp_path / "w.dcm", **two).read_bytes()
    wide, _ = read_radiograph(io.BytesIO(data), bits=16, rules=Rules())
    narrow, _ = read_radiograph(io.BytesIO(data), bits=16, rules=Rules(window=1))
    last, _ = read_radiograph(io.BytesIO(data), bits=16, rules=Rules(window=7))
    assert np.array_equal(narrow, last)
    assert (narrow == 65535).mean() > 0.45 > 0.01 > (wide == 65535).mean()
    without = read_grey(write(tmp_path / "n.dcm"))
    broken = write(tmp_path / "b.dcm", WindowCenter="0", WindowWidth="0")
    assert np.array_equal(read_grey(broken), without)


def test_a_negative_slope_with_a_window_is_not_inverted(tmp_path):
    negative = {"RescaleSlope": "-1", "RescaleIntercept": "4095"}
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    grey = read_grey(write(tmp_path / "w.dcm", **negative, **window))
    assert np.abs(grey.astype(int) - (255 - RAMP // 16)).max() <= 1
    assert np.abs(grey.astype(int) - read_grey(write(tmp_path / "n.dcm", **negative))).max() <= 3


def test_bits_that_are_not_the_lowest_are_refused(tmp_path):
    with pytest.raises(Refused, match="not as the lowest"):
        read_grey(write(tmp_path / "h.dcm", pixels=RAMP << 4, HighBit=15))


def test_more_than_sixteen_bits_are_refused_before_a_table_is_made(tmp_path):
    wide = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}
    pixels = np.array([[0, 2**32 - 1]] * 2, np.uint32)
    with pytest.raises(Refused) as caught:
        read_grey(write(tmp_path / "x.dcm", pixels=pixels, **wide))
    assert caught.value.code == "depth"
    near = write(tmp_path / "y.dcm", pixels=pixels[:, :1] + np.arange(9, dtype=np.uint32), **wide)
    assert read_grey(near).max() == 255


def test_a_long_private_element_does_not_hide_the_patient(tmp_path):
    path = write(tmp_path / "x.dcm", PatientID="PAT7")
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x00090010, "LO", "MAKER")
    dataset.add_new(0x00091001, "OB", bytes(100_000))
    dataset.save_as(path)
    assert read_header(path).patient_id == "PAT7"


def test_of_a_file_that_keeps_no_rule_the_header_alone_is_read(tmp_path):
    path = write(tmp_path / "x.dcm", pixels=np.zeros((2000, 2000), np.uint16), Modality="CT")
    with path.open("rb") as file, pytest.raises(Refused):
        read_radiograph(file, bits=8, rules=Rules())
    read = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    with Counted(path) as file, pytest.raises(Refused):
        read_radiograph(file, bits=8, rules=Rules())
    assert sum(read) < 100_000 < path.stat().st_size


def test_overlay_bits_above_the_stored_ones_are_dropped(tmp_path):
    dirty = RAMP | (np.uint16(1) << 13)
    window = {"WindowCenter": "2048", "WindowWidth": "4096"}
    path = write(tmp_path / "d.dcm", pixels=dirty, **window)
    assert np.array_equal(read_grey(path), read_grey(write(tmp_path / "c.dcm", **window)))


def test_padding_is_black_and_does_not_count(tmp_path):
    pixels = RAMP // 8 + 1000
    pixels[:20] = 4095
    path = write(
        tmp_path / "p.dcm",
        pixels=pixels,
        PixelPaddingValue=4095,
        PhotometricInterpretation="MONOCHROME1",
    )
    grey = read_grey(path)
    assert (grey[:20] == 0).all()
    assert grey[20:].max() == 255


@pytest.mark.parametrize("honest", [True, False])
def test_a_file_that_inflates_without_end_is_refused(tmp_path, honest):
    path = write(tmp_path / "b.dcm")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    data = path.read_bytes()
    meta = data[: 144 + int.from_bytes(data[140:144], "little")]
    if not honest:
        meta = meta[:140] + bytes(4) + meta[144:]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = bytes(1 << 20)
    bomb = b"".join(packer.compress(block) for _ in range(300)) + packer.flush()
    path.write_bytes(meta + bomb)
    with pytest.raises(Refused) as caught:
        read_grey(path)
    assert caught.value.code == "size"


def test_a_frame_that_tells_another_size_than_the_file_is_refused(tmp_path):
    huge = bytearray(jpeg_lossless(RAMP))
    place = huge.index(b"\xff\xc3") + 5
    huge[place : place + 4] = struct.pack(">HH", 60000, 60000)
    path = write(tmp_path / "h.dcm", syntax=JPEGLossless, PixelData=encapsulate([bytes(huge)]))
    with pytest.raises(Refused, match="the compressed frame is 60000 x 60000"):
        read_grey(path)


@given(st.binary(max_size=600), st.integers(0, 2000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(damage, place, cut):
    data = bytearray(good_bytes())
    data = data[:place] if cut else data[:place] + damage + data[place + len(damage) :]
    try:
        grey, _ = read_radiograph(io.BytesIO(bytes(data)), bits=8, rules=Rules())
    except Refused as refusal:
        assert "\n" not in refusal.detail
    else:
        assert grey.dtype == np.uint8
        assert grey.ndim == 2


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name",
    [
        "nema_rg1_chest_j2k_lossless",
        "nema_rg1_chest_j2k_lossy",
        "nema_rg1_chest_jpegls_nearlossless",
    ],
)
def test_real_compressed_chest_radiographs_look_like_the_uncompressed_one(shared_data, name):
    folder = shared_data / "dicom"
    plain = read_grey(folder / "nema_rg1_chest_explicit_uncompressed.dcm").astype(int)
    other = read_grey(folder / f"{name}.dcm").astype(int)
    assert np.abs(other - plain).mean() < 0.5
    # Lungs are dark and the mediastinum bright, though the file is MONOCHROME1.
    height, width = plain.shape
    band = plain[height // 3 : height // 2]
    lung = band[:, width // 5 : width // 3].mean()
    assert lung < band[:, int(width * 0.46) : int(width * 0.54)].mean()


@pytest.mark.shared_data
def test_real_files_of_every_other_syntax(shared_data):
    folder = shared_data / "dicom"
    rle = read_grey(folder / "nema_rg3_tibia_rle.dcm")
    assert np.array_equal(rle, read_grey(folder / "nema_rg3_tibia_jpeg_lossless.dcm"))
    extended = read_grey(folder / "nema_rg3_tibia_jpeg_extended12.dcm")
    assert np.abs(extended.astype(int) - rle).mean() < 3
    one, two = (
        read_grey(folder / f"siim_cr_{name}.dcm") for name in ("jpegbaseline", "fake_monochrome1")
    )
    assert np.abs(one.astype(int) + two - 255).max() <= 1
    for name in ("test2", "test3"):
        assert read_grey(folder / f"nih_dx_{name}.dcm").shape == (1024, 1024)
    with pytest.raises(Refused) as caught:
        data = (folder / "nema_rg3_tibia_rle.dcm").read_bytes()
        read_radiograph(io.BytesIO(data), bits=8, rules=Rules())
    assert caught.value.code == "body-part"
