"""What a DICOM header tells, and whether it is that of a frontal chest radiograph."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from pydicom.errors import BytesLengthException

from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shards import MAX_PIXELS

BROKEN = (
    ValueError,
    RuntimeError,
    AttributeError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    EOFError,
    OSError,
    MemoryError,
    zlib.error,
    struct.error,
    BytesLengthException,
)
"""What pydicom and Pillow raise, depending on where a damaged file is damaged."""


@dataclass(frozen=True)
class Rules:
    """What is taken for a frontal chest radiograph; a tag that a file leaves out refuses nothing.

    Attributes:
        modalities: Allowed modalities; none: any.
        body_parts: Words of which a body part must hold one; none: any.
        lateral: Whether lateral views are taken.
        for_processing: Whether raw detector images, not meant to be looked at, are taken.
        burned_in: Whether images that say that names may be burned into them are taken.
        window: Which of the file's windows or VOI LUTs is applied, from 0; a file that has fewer
            gives its last.
    """

    modalities: tuple[str, ...] = ("CR", "DX", "DR")
    body_parts: tuple[str, ...] = ("CHEST", "THORAX", "LUNG", "TORAX")
    lateral: bool = False
    for_processing: bool = False
    burned_in: bool = False
    window: int = 0


@dataclass(frozen=True)
class Header:
    """What a header tells of the patient and the view; both ids are in clear."""

    patient_id: str | None = None
    study_id: str | None = None
    view: str | None = None
    sex: str | None = None
    age: int | None = None


ANYTHING = Rules((), (), lateral=True, for_processing=True, burned_in=True)
"""Rules that refuse nothing."""


def describe(dataset: Any) -> Header:
    """Patient, view, sex and age of a dataset; what it leaves out or garbles is None."""
    age = re.fullmatch(r"0*(\d{1,3})([DWMY]?)", text_of(dataset, "PatientAge"))
    per_year = {"D": 365, "W": 52, "M": 12}
    return Header(
        patient_id=text_of(dataset, "PatientID") or None,
        study_id=text_of(dataset, "StudyInstanceUID") or None,
        view=text_of(dataset, "ViewPosition").upper() or None,
        sex=text_of(dataset, "PatientSex").upper()[:1] or None,
        age=int(age[1]) // per_year.get(age[2], 1) if age else None,
    )


def text_of(dataset: Any, tag: str) -> str:
    """The text of a tag; empty where it is missing or garbled."""
    try:
        return str(dataset.get(tag, "") or "").strip()
    except BROKEN:
        return ""


def check(dataset: Any, rules: Rules) -> None:
    """Refuse by the header what is no single frontal chest radiograph of a sane size."""
    if not re.fullmatch(r"[\d.]+", text_of(dataset.file_meta, "TransferSyntaxUID")):
        raise Refused("unreadable", "the file names no transfer syntax, or several")
    modality = text_of(dataset, "Modality").upper()
    if rules.modalities and modality and modality not in rules.modalities:
        raise Refused("modality", f"the modality is {modality}")
    part = text_of(dataset, "BodyPartExamined").upper()
    if rules.body_parts and part and not any(word in part for word in rules.body_parts):
        raise Refused("body-part", f"the body part is {part}")
    if not rules.lateral and _lateral(dataset):
        raise Refused("lateral", "the view is lateral")
    intent = text_of(dataset, "PresentationIntentType").upper()
    if not rules.for_processing and intent == "FOR PROCESSING":
        raise Refused("for-processing", "it is a raw image, not meant to be looked at")
    if not rules.burned_in and text_of(dataset, "BurnedInAnnotation").upper() == "YES":
        raise Refused("burned-in", "it says that annotations are burned into it")
    try:
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        samples = int(dataset.get("SamplesPerPixel", 1))
        rows, columns = int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0))
        stored = int(dataset.get("BitsStored", 0))
        top = int(dataset.get("HighBit", stored - 1))
    except BROKEN:
        raise Refused("unreadable", "its size is not a number") from None
    if top != stored - 1:
        # pydicom takes the lowest bits whatever HighBit says.
        raise Refused("undecodable", f"{stored} bits are stored, but not as the lowest ones")
    if frames > 1:
        raise Refused("multi-frame", f"{frames} frames")
    if samples not in (1, 3):
        raise Refused("not-grey", f"{samples} samples a pixel")
    if not rows * columns:
        raise Refused("no-pixels", f"{rows} x {columns} pixels")
    if rows * columns > MAX_PIXELS:
        raise Refused("size", f"{rows} x {columns} pixels are too many")


def _lateral(dataset: Any) -> bool:
    """Whether a file says that its view is from the side."""
    view = text_of(dataset, "ViewPosition").upper()
    if view:
        return view in ("LL", "RL", "LLO", "RLO", "LAO", "RAO") or view.startswith("LAT")
    try:
        words = [text_of(code, "CodeMeaning") for code in dataset.get("ViewCodeSequence") or []]
    except BROKEN:
        words = []
    words.append(text_of(dataset, "SeriesDescription"))
    return any(re.search(r"\blat(eral)?\b", text, re.IGNORECASE) for text in words)
