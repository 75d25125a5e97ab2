"""The folder source: classes from subfolders, or a CSV, and a sentence for each mistake."""

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import s3fs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.sources.folder import Columns, list_csv, list_folder


@pytest.fixture
def folder(tmp_path):
    for name in ("NORMAL/a.png", "NORMAL/person1_b.png", "SICK/person1_c.jpeg", "loose.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    (tmp_path / "SICK" / "notes.txt").write_text("not an image")
    return tmp_path


def test_a_subfolder_is_a_class_and_a_pattern_finds_the_patient(folder):
    records = list_folder(folder, name="x", patient_regex="(person[0-9]+)_").records
    by_id = {record.image_id: record for record in records}
    assert sorted(by_id) == [
        "NORMAL/a.png",
        "NORMAL/person1_b.png",
        "SICK/person1_c.jpeg",
        "loose.png",
    ]
    assert by_id["SICK/person1_c.jpeg"].labels == {"NORMAL": 0, "SICK": 1}
    assert by_id["loose.png"].labels == {"NORMAL": None, "SICK": None}
    assert by_id["NORMAL/person1_b.png"].patient_id == "person1"
    assert by_id["SICK/person1_c.jpeg"].patient_id == "person1"
    assert by_id["NORMAL/a.png"].patient_id == "NORMAL/a.png"


def test_a_pattern_finds_the_patient_in_a_folder_too(folder):
    records = list_folder(folder, name="x", patient_regex="^([A-Z]+)/").records
    assert {r.image_id: r.patient_id for r in records} == {
        "NORMAL/a.png": "NORMAL",
        "NORMAL/person1_b.png": "NORMAL",
        "SICK/person1_c.jpeg": "SICK",
        "loose.png": "loose.png",
    }


@pytest.mark.parametrize(
    ("folders", "splits", "words"),
    [
        (("train", "val", "test"), ("train", "val", "test"), "by subfolder: test, train, val."),
        (
            ("Training", "Test"),
            ("train_val", "test"),
            "by subfolder: Test, Training; train is cut by patient into train and val.",
        ),
    ],
)
def test_subfolders_that_are_all_splits_hold_the_classes(tmp_path, folders, splits, words):
    for name in folders:
        (tmp_path / name / "SICK").mkdir(parents=True)
        (tmp_path / name / "SICK" / f"{name}.png").touch()
    listing = list_folder(tmp_path, name="x")
    assert sorted((r.split, r.labels["SICK"]) for r in listing.records) == sorted(
        (split, 1) for split in splits
    )
    assert words in " ".join(listing.notes)
    # One folder more, and they are classes as any other.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.png").touch()
    records = list_folder(tmp_path, name="x").records
    assert {*records[0].labels} == {*folders, "more"}
    assert {r.split for r in records} == {None}


def rows(folder, text, **options):
    (folder / "t.csv").write_text(text)
    return list_csv(folder, folder / "t.csv", name="x", columns=Columns(), **options).records


def test_a_table_gives_labels_patients_and_splits(folder):
    records = rows(
        folder,
        "path,labels,patient,split,view,sex,age\n"
        "NORMAL/a.png,,p1,train,PA,F,058Y\n"
        "loose.png,Mass|Edema,p2,test,AP,male,40\n"
        "SICK/person1_c.jpeg,?,p3,,,,\n",
        unknown="?",
    )
    assert [r.labels for r in records] == [
        {"Edema": 0, "Mass": 0},
        {"Edema": 1, "Mass": 1},
        {"Edema": None, "Mass": None},
    ]
    assert [(r.patient_id, r.split, r.sex, r.age) for r in records] == [
        ("p1", "train", "F", 58),
        ("p2", "test", "M", 40),
        ("p3", None, None, None),
    ]


def test_a_pattern_finds_the_patients_that_a_table_does_not_name(folder):
    text = "path,patient\nNORMAL/a.png,p1\nNORMAL/person1_b.png,\n"
    records = rows(folder, text, patient_regex="(person[0-9]+)_")
    assert [r.patient_id for r in records] == ["p1", "person1"]


def test_where_takes_some_rows(folder):
    text = "path,labels\nNORMAL/a.png,\nloose.png,Mass\n"
    assert len(rows(folder, text, where=["path=NORMAL/*"])) == 1
    with pytest.raises(DataError, match="no row is left"):
        rows(folder, text, where=["path=nothing*"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,labels\nloose.png,\n", "no column 'path'"),
        ("path,labels\nloose.png,\ngone.png,\n", "1 of 2 files are not in .* gone.png"),
        ("path,age\nloose.png,old\n", "line 2: the age 'old'"),
        ("path,labels\nloose.png,a,b\n", "line 2: more cells than columns"),
    ],
)
def test_a_wrong_table_is_one_sentence(folder, text, words):
    with pytest.raises(DataError, match=words):
        rows(folder, text)


def test_a_table_of_a_store_that_cannot_be_read_is_one_sentence(folder, s3, monkeypatch):
    monkeypatch.setattr("mlvicx_dist.storage.TRIES", 1)
    with pytest.raises(DataError, match=r"gone\.csv: the table cannot be read \("):
        list_csv(folder, f"{s3}/gone.csv", name="x", columns=Columns())
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("SHARED_CREDENTIALS_FILE", "CONFIG_FILE"):
        monkeypatch.setenv(f"AWS_{name}", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"cannot be read \(NoCredentialsError: .*; give a CSV"):
        list_csv(folder, f"{s3}/labels.csv", name="x", columns=Columns())


def test_missing_and_empty_folders_say_so(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        list_folder(tmp_path / "gone", name="x")
    with pytest.raises(DataError, match="no images in it"):
        list_folder(tmp_path, name="x")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"ward{k}" for k in range(41)], "the subfolders are 41"),
        (["Doe^Jane"], "look like patients or dates"),
        (["2024-03-01"], "look like patients or dates"),
    ],
)
def test_subfolders_that_may_name_patients_are_not_taken_for_classes(tmp_path, names, words):
    for name in names:
        path = tmp_path / name / "a.png"
        path.parent.mkdir()
        path.touch()
    with pytest.raises(DataError, match=rf"{words}.*--no-classes"):
        list_folder(tmp_path, name="x")
    assert list_folder(tmp_path, name="x", classes=False).records[0].labels == {}


def test_what_is_not_known_or_not_taken_is_said(folder):
    notes = " ".join(list_folder(folder, name="x", patient_regex="(person[0-9]+)_").notes)
    assert "of 2 of 4 images the patient is not known" in notes
    assert "named in the shards: NORMAL, SICK" in notes
    assert "1 of 5 files are no images" in notes


def test_a_table_without_labels_says_so(folder):
    (folder / "t.csv").write_text("path,label\nNORMAL/a.png,Mass\n")
    notes = list_csv(folder, folder / "t.csv", name="x", columns=Columns()).notes
    assert any("no column 'labels', so no image has a label" in note for note in notes)


@pytest.mark.parametrize(
    ("patients", "words"),
    [
        ([""] * 3, "of 3 of 3 images the header names a study and no patient"),
        (["ANONYMOUS"] * 3, "all 3 images are of one patient, so all come into one split"),
    ],
)
def test_headers_that_do_not_tell_patients_apart_are_told(phantom_files, tmp_path, patients, words):
    for number, patient in enumerate(patients):
        dataset = pydicom.dcmread(next((phantom_files / "dicom").iterdir()))
        dataset.PatientID, dataset.StudyInstanceUID = patient, f"1.{number}"
        dataset.save_as(tmp_path / f"{number}.dcm")
    listing = list_folder(tmp_path, name="x")
    expected = patients if patients[0] else ["1.0", "1.1", "1.2"]
    assert sorted(r.patient_id for r in listing.records) == expected
    assert words in " ".join(listing.notes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "Mass"], "--classes: it is about a table"),
        (["--where", "path=a*"], "--where: it is about a table"),
        (["--labels-column", "label"], "--labels-column: it is about a table"),
        (["--csv", "t.csv", "--no-classes"], "--no-classes: it is about subfolders"),
    ],
)
def test_an_argument_without_effect_is_refused(folder, tmp_path_factory, arguments, words):
    script = Path(__file__).parents[2] / "sharding" / "shard_folder.py"
    out = tmp_path_factory.mktemp("shards") / "out"
    command = [sys.executable, script, "--source", folder, "--out", out, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_dicom_files_are_found_whatever_their_name(phantom_files, tmp_path):
    names = ("1.2.276.0.7230010.3.1.4.850819", "IM0001", "a.dcm")
    for name, path in zip(names, sorted((phantom_files / "dicom").iterdir()), strict=False):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "notes.doc").write_text("no image")
    records = list_folder(tmp_path, name="x").records
    assert {record.image_id for record in records} == set(names)
    assert len({record.patient_id for record in records}) == 3


def test_a_name_in_latin_1_is_packed(tmp_path, salt):
    name = os.fsencode(str(tmp_path)) + b"/M\xfcller.png"
    with open(name, "wb") as file:
        Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8)).save(file, "PNG")
    with open(name[:-4] + b"2.png", "wb") as file:
        file.write(b"no image")
    records = list_folder(tmp_path, name="x").records
    report = pack(records, tmp_path / "out", settings=PackSettings(), salt=salt, max_refused=0.5)
    assert report.reasons() == {"unreadable": 1}
    assert sum(report.manifest.splits.values()) == 1


@pytest.mark.parametrize("cell", ["Doe^Jane", "1950-03-04"])
def test_labels_that_may_name_patients_are_not_taken_for_classes(folder, cell):
    table = folder / "t.csv"
    table.write_text(f"path,who,finding\nloose.png,{cell},Pneumonia\n")
    with pytest.raises(DataError, match=r"labels of column 'who' look like patients.*--labels-col"):
        list_csv(folder, table, name="x", columns=Columns(labels="who"))
    found = list_csv(folder, table, name="x", columns=Columns(labels="finding"))
    assert f"{table}: classes, named in the shards: Pneumonia." in found.notes
    chosen = list_csv(folder, table, name="x", columns=Columns(labels="who"), classes=[cell])
    assert list(chosen.records[0].labels) == [cell]


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (Columns(patient="patientid"), {}, "no column 'patientid'.*'patient_id'"),
        (Columns(labels="labelz"), {}, "no column 'labelz'"),
        (Columns(), {"classes": ["Pneumonia"]}, "no column 'labels'.*'label'"),
        (Columns(labels="label"), {"classes": ["pneumonia"]}, "did you mean 'Pneumonia'"),
    ],
)
def test_a_column_or_class_that_is_misspelt_is_an_error(folder, columns, options, words):
    (folder / "t.csv").write_text("path,label,patient_id\nloose.png,Pneumonia,p1\n")
    with pytest.raises(DataError, match=words):
        list_csv(folder, folder / "t.csv", name="x", columns=columns, **options)


CELL = st.text('abp1,|"?. \n', max_size=12)


@given(st.lists(st.tuples(CELL, CELL, CELL, CELL), max_size=6))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_is_records_or_one_sentence(folder, cells):
    paths = ["NORMAL/a.png", "loose.png", "SICK/person1_c.jpeg"]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["path", "labels", "patient", "age"])
    table = [(paths[i % 3], *row[1:]) if i % 4 else row for i, row in enumerate(cells)]
    writer.writerows(table)
    try:
        records = rows(folder, buffer.getvalue())
    except DataError as error:
        assert str(error).startswith(str(folder / "t.csv"))
    else:
        assert [r.image_id for r in records] == [row[0].strip() for row in table if any(row)]
        for record, row in zip(records, table, strict=True):
            present = {label for label, value in record.labels.items() if value}
            assert present <= {label.strip() for label in row[1].split("|")}
