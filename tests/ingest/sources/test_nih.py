"""NIH ChestX-ray14: every release of its files, the official split, boxes, and what is missing."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.sources.nih import CLASSES, list_nih
from mlvicx_dist.ingest.sources.tables import differences, read_table

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    "00000001_000.png,Cardiomegaly,0,1,57,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,Cardiomegaly|Emphysema,1,1,058Y,M,PA,2894,2729,0.143,0.143",
    "00000002_000.png,No Finding,0,2,80,F,AP,2500,2048,0.168,0.168",
    "00000003_000.png,Hernia,0,3,414,F,AP,2500,2048,0.168,0.168",
]
BOXES = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00000001_000.png,Infiltrate,100.5,200,50,60,,,
00000001_000.png,Cardiomegaly,1,2,3,4,,,
"""


@pytest.fixture
def nih(tmp_path):
    write(tmp_path)
    for number, folder in enumerate(("images_001/images", "images_002/images", "images", "")):
        path = tmp_path / folder / ROWS[number].split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def write(folder, *, header=HEADER, rows=ROWS, tail="", name="Data_Entry_2017_v2020.csv"):
    text = "\n".join([header + tail, *(row + tail for row in rows)]) + "\n"
    (folder / name).write_text(text)
    (folder / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    (folder / "test_list.txt").write_text("00000002_000.png\r\n00000003_000.png\r\n")


@pytest.mark.parametrize("tail", ["", ","])
def test_labels_split_and_everything_else(nih, tail):
    write(nih, tail=tail)
    (nih / "BBox_List_2017.csv").write_text(BOXES)
    one, two, three, four = list_nih(nih).records
    assert [c for c in CLASSES if two.labels[c]] == ["Cardiomegaly", "Emphysema"]
    assert list(one.labels) == list(CLASSES)
    assert not any(three.labels.values())
    assert [r.split for r in (one, two, three, four)] == ["train_val"] * 2 + ["test"] * 2
    assert [r.age for r in (one, two, three, four)] == [57, 58, 80, 414]  # shards leave out 414
    assert (three.patient_id, three.sex, three.view) == ("2", "F", "AP")
    assert [(b.label, b.left, b.right) for b in one.boxes] == [
        ("Infiltration", 100.5, 150.5),
        ("Cardiomegaly", 1, 4),
    ]


def test_what_is_missing_is_said(nih):
    (nih / "images_002/images/00000001_001.png").unlink()
    listing = list_nih(nih)
    assert len(listing.records) == 3
    assert "1 of 4 images" in listing.notes[0]
    assert "a part of the set, 4 of 112,120 images" in listing.notes[1]
    assert "00000001_001.png" in listing.notes[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROWS[0], "line 6: the image 00000001_000.png stands twice"),
        ("00000009_000.png,Hernia,0,9,1,M,PA,1,1,1,1", "is in neither"),
        ("00000003_000.png,Hernja,0,3,1,M,PA,1,1,1,1", "'Hernja' is no finding.*'Hernia'"),
        ("00000003_000.png,Hernia|No Finding,0,3,1,M,PA,1,1,1,1", "stands beside a finding"),
        ("00000003_000.png,Hernia,0,,1,M,PA,1,1,1,1", "has no name"),
        ("00000003_000.png,Hernia,0,3,old,M,PA,1,1,1,1", "the age 'old'"),
        ("00000003_000.png,Hernia,0,3,1,M,PA,1,1,1,1,extra", "more cells than columns"),
    ],
)
def test_a_row_that_cannot_be_is_named_with_its_line(nih, row, words):
    write(nih, rows=[*ROWS[:3], row] if not row.startswith("00000001") else [*ROWS, row])
    with pytest.raises(DataError, match=words):
        list_nih(nih)


def test_a_missing_file_is_named(nih):
    (nih / "test_list.txt").unlink()
    with pytest.raises(DataError, match=r"test_list.txt is not in it.*--no-official-splits"):
        list_nih(nih)
    assert list_nih(nih, official=False).records[0].split is None
    (nih / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(DataError, match=r"Data_Entry_2017.csv is not in it.*--labels"):
        list_nih(nih)
    with pytest.raises(DataError, match="no such folder"):
        list_nih(nih / "gone")


def test_an_image_in_both_lists_is_an_error(nih):
    (nih / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(DataError, match=r"00000001_000.png is in both official lists"):
        list_nih(nih)


def test_counts_are_held_against_the_published_ones():
    published = {"a": 1_000, "b": 5}
    assert differences("x", published, published, of="a") == ["x: whole, every count as published."]
    (note,) = differences("x", {"a": 1_000, "b": 4}, published, of="a")
    assert "b 4, but 5 were published" in note
    (note,) = differences("x", {"a": 999, "b": 5}, published, of="a")
    assert note == "x: a part of the set, 999 of 1,000 a."


@given(st.text(max_size=400))
@settings(deadline=None)
def test_any_text_is_a_table_or_one_sentence(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        table = read_table(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert len(table.rows) <= text.count("\n") + text.count("\r") + 1


LABEL = st.sets(st.sampled_from(CLASSES), max_size=4)


@given(st.lists(st.tuples(LABEL, st.integers(1, 6)), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=50)
def test_counts_are_right_whatever_the_rows(tmp_path_factory, images, data):
    folder = tmp_path_factory.mktemp("n")
    names = [f"{i:08d}_000.png" for i in range(len(images))]
    rows = [
        f"{name},{'|'.join(sorted(found)) or 'No Finding'},0,{patient},50,M,PA,1,1,1,1"
        for name, (found, patient) in zip(names, images, strict=True)
    ]
    write(folder, rows=rows)
    in_test = data.draw(st.sets(st.integers(1, 6)))
    for list_name, wanted in (("train_val_list.txt", False), ("test_list.txt", True)):
        chosen = [n for n, (_, p) in zip(names, images, strict=True) if (p in in_test) == wanted]
        (folder / list_name).write_text("\n".join(chosen))
    for name in names:
        (folder / name).touch()
    records = list_nih(folder).records
    for finding in CLASSES:
        expected = sum(finding in found for found, _ in images)
        assert sum(record.labels[finding] for record in records) == expected
    assert sum(record.split == "test" for record in records) == sum(p in in_test for _, p in images)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name",
    ["Data_Entry_2017.csv", "Data_Entry_2017_nocomma_copy.csv", "Data_Entry_2017_v2020.csv"],
)
def test_the_real_files_of_every_release(shared_data, tmp_path, name):
    formats = shared_data / "label_formats"
    for file in ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"):
        (tmp_path / file).write_bytes((formats / file).read_bytes())
    with (formats / name).open() as file:
        names = [row[0] for row in csv.reader(file)][1:]
    (tmp_path / "images").mkdir()
    for image in names:
        (tmp_path / "images" / image).touch()
    records = list_nih(tmp_path, labels=formats / name).records
    assert [record.image_id for record in records] == names
    assert {record.split for record in records} <= {"train_val", "test"}
    assert {record.view for record in records} <= {"PA", "AP"}
    patients = {r.patient_id: r.split for r in records}
    assert all(patients[r.patient_id] == r.split for r in records)
