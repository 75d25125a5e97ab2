"""VinBig, RSNA and SIIM: readers, boxes and masks as their label files have them."""

import csv
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import encode_runs

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.masks import RunLengths, decode_runs
from mlvicx_dist.ingest.sources.rsna import OPACITY, list_rsna
from mlvicx_dist.ingest.sources.siim import list_siim
from mlvicx_dist.ingest.sources.vinbig import CLASSES, list_vinbig

VINBIG = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
RSNA = "patientId,x,y,width,height,Target\n"


def files(folder, names, suffix=".dcm", inside="images"):
    (folder / inside).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / inside / f"{name}{suffix}").touch()


@pytest.fixture
def vinbig(tmp_path):
    files(tmp_path, ["a", "b", "c"], ".dicom", "train")

    def write(text):
        (tmp_path / "train.csv").write_text(VINBIG + text)
        return tmp_path

    return write


THREE_READERS = (
    "a,Cardiomegaly,3,R1,10,20,30,40\na,Cardiomegaly,3,R2,11,21,31,41\na,ILD,5,R1,1,2,3,4\n"
    "a,No finding,14,R3,,,,\nb,No finding,14,R1,,,,\nb,No finding,14,R2,,,,\n"
    "b,No finding,14,R3,,,,\n"
)


def test_one_reader_is_enough_or_most_of_them_must_agree(vinbig):
    source = vinbig(THREE_READERS)
    for readers, expected, boxes in (
        ("union", ["Cardiomegaly", "ILD"], 3),
        ("majority", ["Cardiomegaly"], 2),
    ):
        a, b = list_vinbig(source, readers=readers).records
        assert [c for c in CLASSES if a.labels[c]] == expected
        assert len(a.boxes) == boxes
        assert not any(b.labels.values())
        assert b.boxes == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,Cardiomegaly,4,R1,1,2,3,4\n", "class_id 4 is not 'Cardiomegaly'"),
        ("a,Cardiomegali,3,R1,1,2,3,4\n", r"'Cardiomegali' is no class.*'Cardiomegaly'"),
        ("a,Cardiomegaly,3,R1,1,2,,4\n", "line 2: '' is not a number"),
        ("a,Cardiomegaly,3,R1,5,2,3,4\n", "the box of Cardiomegaly is empty"),
        ("a,No finding,14,,,,,\n", "its reader has no name"),
        ("gone,No finding,14,R1,,,,\n", "none of the 1 images"),
    ],
)
def test_a_wrong_row_of_vinbig_is_named(vinbig, text, words):
    with pytest.raises(DataError, match=words):
        list_vinbig(vinbig(text))


@pytest.fixture
def rsna(tmp_path):
    files(tmp_path, ["p1", "p2", "p3"], inside="stage_2_train_images")

    def write(text, detail=None):
        (tmp_path / "stage_2_train_labels.csv").write_text(RSNA + text)
        if detail:
            table = tmp_path / "stage_2_detailed_class_info.csv"
            table.write_text("patientId,class\n" + detail)
        return tmp_path

    return write


def test_one_row_a_box_and_one_record_a_patient(rsna):
    text = "p1,264.0,152.0,213.0,379.0,1\np1,562.0,152.0,256.0,453.0,1\np2,,,,,0\np3,,,,,0\n"
    detail = f"p1,{OPACITY}\np1,{OPACITY}\np2,Normal\np3,No Lung Opacity / Not Normal\n"
    one, two, three = list_rsna(rsna(text)).records
    assert [(b.left, b.right, b.bottom) for b in one.boxes] == [(264, 477, 531), (562, 818, 605)]
    assert list(two.labels.values()) == [0, None, None]
    one, two, three = list_rsna(rsna(text, detail)).records
    assert [list(r.labels.values()) for r in (one, two, three)] == [
        [1, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
    ]


@pytest.mark.parametrize(
    ("text", "detail", "words"),
    [
        ("p1,1,1,5,5,1\np1,,,,,0\n", None, "p1 is positive and negative"),
        ("p1,,,,,0\np1,1,1,5,5,1\n", None, "p1 is positive and negative"),
        ("p1,,,,,2\n", None, "has the Target '2'"),
        ("p1,1,1,0,5,1\n", None, "the box is empty"),
        ("p1,1,1,5,5,0\n", None, "a negative has a box"),
        ("p1,,,,,0\n", f"p1,{OPACITY}\n", "its Target says otherwise"),
        ("p1,,,,,0\n", "p1,Normal\np1,No Lung Opacity / Not Normal\n", "p1 has two classes"),
        ("p1,,,,,0\n", "p1,normal\n", "'normal' is no class"),
    ],
)
def test_a_wrong_row_of_rsna_is_named(rsna, text, detail, words):
    with pytest.raises(DataError, match=words):
        list_rsna(rsna(text, detail))


@pytest.fixture
def siim(tmp_path):
    files(tmp_path, ["1.2.3"], inside="dicom-images-train/s/e")
    files(tmp_path, ["1.2.4"], inside="dicom-images-train/t/e")

    def write(text, header="ImageId, EncodedPixels\n", name="train-rle.csv"):
        (tmp_path / name).write_text(header + text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("header", "negative"), [("ImageId, EncodedPixels\n", "-1"), ("ImageId,EncodedPixels\n", " -1")]
)
def test_masks_of_several_rows_are_joined(siim, header, negative):
    source = siim(f"1.2.3, 2 3 1019 2\n1.2.3,4 4\n1.2.4,{negative}\n", header)
    one, two = list_siim(source).records
    mask = decode_runs(one.mask)
    assert mask.shape == (1024, 1024)
    # 2 3: rows 2 to 4 of column 0; 1019 after it is row 0 of column 1; 4 4: rows 4 to 7.
    assert np.flatnonzero(mask[:, 0]).tolist() == [2, 3, 4, 5, 6, 7]
    assert np.flatnonzero(mask[:, 1]).tolist() == [0, 1]
    assert mask.sum() == 8
    assert list(one.labels.values()) == [1]
    assert list(two.labels.values()) == [0]
    assert not decode_runs(two.mask).any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.2.3,1 2 3\n", "not a list of pairs"),
        ("1.2.3,1 x\n", "mask of 1.2.3 cannot be read"),
        ("1.2.3,1048570 7\n", "reach beyond the 1048576 pixels"),
        ("1.2.3,-1 4\n", "not a list of pairs"),
        ("1.2.3,1 99999999999999999999\n", "reach beyond"),
        ("1.2.3,4611686018427387904 4611686018427387904\n", "reach beyond"),
        ("1.2.3,-1\n1.2.3,1 2\n", "negative and stands more than once"),
        ("1.2.3,1 2\n1.2.3,-1\n", "negative and stands more than once"),
        ("1.2.3,\n", "no EncodedPixels"),
    ],
)
def test_a_wrong_row_of_siim_is_named(siim, text, words):
    with pytest.raises(DataError, match=words):
        list_siim(siim(text))


def test_two_files_of_one_name_are_an_error(siim, tmp_path):
    files(tmp_path, ["1.2.3"], inside="copy")
    with pytest.raises(DataError, match=r"1.2.3.dcm is there twice"):
        list_siim(siim("1.2.3,-1\n"))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_make_the_round_trip(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    assert np.array_equal(decode_runs(RunLengths((encode_runs(mask),), height, width)), mask)


CELLS = st.sampled_from(["", "0", "1", "-1", "p1", "p2", "R1", "3", "14", "Cardiomegaly", "1 2"])


@given(st.lists(st.lists(CELLS, min_size=2, max_size=9), max_size=8))
@settings(deadline=None)
def test_any_rows_are_records_or_one_sentence(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    files(folder, ["p1", "p2", "R1"])
    text = "".join(",".join(row) + "\n" for row in rows)
    for header, name, lister in (
        (VINBIG, "train.csv", list_vinbig),
        (RSNA, "stage_2_train_labels.csv", list_rsna),
        ("ImageId, EncodedPixels\n", "train-rle.csv", list_siim),
    ):
        (folder / name).write_text(header + text)
        try:
            records = lister(folder).records
        except DataError as error:
            assert "\n" not in str(error)
        else:
            firsts = {row[0] for row in rows} - {""}
            assert {record.image_id for record in records} == firsts & {"p1", "p2", "R1"}


@pytest.mark.shared_data
def test_the_real_label_files(shared_data, tmp_path):
    formats = shared_data / "label_formats"

    def rows(name):
        with (formats / name).open() as file:
            return list(csv.DictReader(file, skipinitialspace=True))

    table = rows("vinbigdata_train.csv")
    files(tmp_path / "v", {row["image_id"] for row in table}, ".dicom")
    records = list_vinbig(tmp_path / "v", labels=formats / "vinbigdata_train.csv").records
    found = Counter(c for r in records for c in CLASSES if r.labels[c])
    for name in CLASSES:
        expected = {row["image_id"] for row in table if row["class_name"] == name}
        assert found[name] == len(expected)
    assert sum(len(r.boxes) for r in records) == sum(row["class_id"] != "14" for row in table)

    table = rows("stage_2_train_labels.csv")
    files(tmp_path / "r", {row["patientId"] for row in table})
    detail = formats / "stage_2_detailed_class_info.csv"
    (tmp_path / "r" / detail.name).write_bytes(detail.read_bytes())
    records = list_rsna(tmp_path / "r", labels=formats / "stage_2_train_labels.csv").records
    assert sum(len(r.boxes) for r in records) == sum(row["Target"] == "1" for row in table)
    assert len(records) == len({row["patientId"] for row in table})

    for name in ("siim_train-rle.csv", "siim_fin_positives_nospace_header.csv"):
        table = rows(name)
        files(tmp_path / name, {row["ImageId"] for row in table})
        records = list_siim(tmp_path / name, labels=formats / name).records
        positive = {row["ImageId"] for row in table if row["EncodedPixels"].strip() != "-1"}
        assert {r.image_id for r in records if r.labels["Pneumothorax"]} == positive
        assert all(decode_runs(r.mask).any() == bool(r.mask.runs) for r in records[:20])
