"""What fine-tuning, segmentation and localisation found, as tables for the summary and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Cell = Mapping[str, float]
Row = tuple[str, int | str, Mapping[str, Cell]]


@dataclass(frozen=True)
class Table:
    """A table of both encoders and their difference.

    Attributes:
        title: A sentence.
        unit: What the rows are of, such as `class`.
        count: What the numbers behind the names count.
        rows: Name, count or nothing, and by `pretrained`, `untrained` and `difference` a cell.
        notes: Sentences below it.
    """

    title: str
    unit: str
    count: str
    rows: list[Row]
    notes: list[str]


ONCE = (
    "Each encoder was trained once, with one seed: the intervals resample patients and do not "
    "count the spread of trainings."
)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Those of the parts that an evaluation has."""
    parts = (("fine_tune", _fine_tuned), ("segment", _segmented), ("localise", _localised))
    return [words(result, result[name]) for name, words in parts if result.get(name)]


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What is to be known of the result as a whole."""
    found = []
    if result.get("untrained", {}).get("assumed"):
        found.append(
            f"The export does not tell the seed of its training: {result['untrained']['seed']} was "
            "assumed for the untrained encoder, so these may not be the weights that it began with."
        )
    if missing := result.get("missing"):
        found.append(
            f"Not whole: {', '.join(missing)} not there yet, or the evaluation was stopped."
        )
    return found


def _fine_tuned(result: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    areas = found["auroc"]
    rows: list[Row] = [
        (name, result["positives"].get(name, ""), {kind: areas[kind][name] for kind in areas})
        for name in [*result["classes"], "mean"]
    ]
    epochs = ", ".join(
        f"{name} {one['best']} of {len(one['validation_auroc'])}"
        for name, one in found["epochs"].items()
    )
    title = "Fine-tuned as a whole, AUROC on the test images; the epoch is chosen on validation."
    return Table(title, "class", "positives", rows, [f"Epoch taken of those run: {epochs}.", ONCE])


def _segmented(result: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    dice = found["dice"]
    rows: list[Row] = [
        ("all images", found["images"], dice["all"]),
        ("with a mask", found["positives"], dice["positive"]),
    ]
    how = "trained" if result["settings"]["segment"]["train_encoder"] else "frozen"
    title = (
        f"Segmentation by a small decoder on the {how} encoder, Dice at {found['size_px']} px; "
        "nothing where nothing is counts 1."
    )
    nothing = dice["all"]["nothing"]["value"]
    notes = [
        f"Predicting nothing has {nothing:.3f} over all images; the pretrained encoder minus that: "
        f"{signed(dice['all']['over_nothing'])}."
    ]
    notes.append(ONCE)
    if found["unmarked"]:
        notes.append(f"Left out: {found['unmarked']} test images without any mask, empty or not.")
    return Table(title, "Dice", "images", rows, notes)


def _localised(result: Mapping[str, Any], found: Mapping[str, Any]) -> Table:
    peak, overlap = found["peak"], found["overlap"]
    rows: list[Row] = [
        ("peak in a box", found["images"], peak),
        ("overlap (IoU)", found["images"], overlap),
    ]
    title = "The context's maps against boxes; level and threshold are chosen on validation."
    notes = [
        f"Chance of a hit: {peak['random']['value']:.3f} of a random point, "
        f"{peak['centre']['value']:.3f} of the centre; pretrained minus random "
        f"{signed(peak['over_random'])}, minus the centre {signed(peak['over_centre'])}.",
        f"The whole image overlaps by {overlap['whole']['value']:.3f}; pretrained minus that: "
        f"{signed(overlap['over_whole'])}.",
    ]
    return Table(title, "map", "images", rows, notes)


def signed(cell: Cell) -> str:
    """A difference with its interval."""
    return "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**cell)
