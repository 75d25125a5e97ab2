"""The result of an evaluation as text of at most 100 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from mlvicx_dist.evaluate.overlap import overlap_words
from mlvicx_dist.evaluate.tables import remarks, signed, tables

WIDTH = 100
NAME = 18
"""Columns of a name; a longer one is cut."""


def summary(result: Mapping[str, Any]) -> list[str]:
    """The result as tables in lines of text."""
    confidence = result["settings"]["bootstrap"]["confidence"]
    test = result["splits"][result["settings"]["data"]["test"]]
    knn = {kind: result["knn"][kind]["mean"]["value"] for kind in ("pretrained", "untrained")}
    folds = result["settings"].get("folds")
    by_fold = f", in {folds} folds" if folds else ""
    return [
        f"Linear probe, AUROC on {test['images']} images of {test['patients']} patients{by_fold}; "
        f"{100 * confidence:g}% intervals over patients.",
        *_areas(result),
        "Average precision (AUPRC), and the pretrained encoder's calibration; p is DeLong's,",
        "of equal AUROC, which takes each image for a patient.",
        *_precision(result),
        f"Nearest neighbours, mean AUROC: {knn['pretrained']:.3f} pretrained, "
        f"{knn['untrained']:.3f} untrained.",
        f"Ridge regression on 24 x 24 pixels: {cell(result['probe']['pixels']['mean'])};",
        f"  pretrained minus pixels: {signed(result['probe']['over_pixels']['mean'])}.",
        *_few_labels(result),
        *_tables(result),
        *_subgroups(result),
        *_notes(result),
    ]


def _heading(name: str, count: str, last: str = f"{'difference':>23}") -> str:
    return f"{name:{NAME}} {count:>9} {'pretrained':>20}  {'untrained':>20}  {last}"


def _areas(result: Mapping[str, Any]) -> list[str]:
    lines = [
        _heading("class", "positives"),
    ]
    for name in [*result["classes"], "mean"]:
        cells = compared(result["probe"], name)
        lines.append(f"{cut(name)} {result['positives'].get(name, ''):>9} {cells}")
    return lines


def _precision(result: Mapping[str, Any]) -> list[str]:
    lines = [
        _heading("class", "positive", f"{'ECE':>5}  {'Brier':>5}  {'p':>6}"),
    ]
    shares = result["shares"]
    for name in [*result["classes"], "mean"]:
        share = f"{shares[name]:.1%}" if name in shares else ""
        areas = "  ".join(cell(result["auprc"][kind][name]) for kind in ("pretrained", "untrained"))
        errors = result["calibration"]["pretrained"][name]
        lines.append(
            f"{cut(name)} {share:>9} {areas}  {errors['ece']:5.3f}  {errors['brier']:5.3f}"
            + (f"  {_p(result['delong'][name])}" if name in result["delong"] else "")
        )
    return lines


def _p(p: float | None) -> str:
    """A p-value in 6 columns; a dash where it is not defined, which older files have as NaN."""
    if p is None or math.isnan(p):
        return f"{'-':>6}"
    return f"{p:6.4f}" if p >= 5e-5 else "<.0001"


def _few_labels(result: Mapping[str, Any]) -> list[str]:
    """Means at each share of the training patients, and which classes they are not about."""
    shares = result["few_labels"]
    if not shares:
        return []
    lines = [
        "Few labels, mean AUROC; intervals over draws and patients; * without classes named below.",
        _heading("patients", "draws"),
    ]
    for one in shares:
        cells = compared(one, None) if "difference" in one else "no class with both labels"
        mark = " *" if one["left_out"] else ""
        name = f"{one['fraction']:.1%}, {one['patients']}{mark}"
        lines.append(f"{cut(name)} {len(one['images']):>9} {cells}")
    for one in shares:
        if one["left_out"]:
            lines += wrapped(f"Left out at {one['fraction']:.1%}: {', '.join(one['left_out'])}.")
    return lines


def _tables(result: Mapping[str, Any]) -> list[str]:
    """Fine-tuning, segmentation and localisation, as far as they were asked for."""
    lines = []
    for table in tables(result):
        lines += [*wrapped(table.title), _heading(table.unit, table.count)]
        for name, count, cells in table.rows:
            lines.append(f"{cut(name)} {count:>9} {compared(cells, None)}")
        for note in table.notes:
            lines += wrapped(note)
    return lines


def _subgroups(result: Mapping[str, Any]) -> list[str]:
    """Means of the subgroups, and which classes they are not about."""
    groups = result["subgroups"]
    if not groups:
        return []
    lines = [
        "Subgroups, mean AUROC; * without classes that it cannot judge, named below.",
        _heading("subgroup", "images"),
    ]
    for name, one in groups.items():
        cells = compared(one, "mean") if "difference" in one else "no class with both labels"
        marked = f"{name} *" if one["left_out"] else name
        lines.append(f"{cut(marked)} {one['images']:>9} {cells}")
    for name, one in groups.items():
        if not one["images"]:
            lines.append(f"{name}: no image.")
        elif one["left_out"]:
            lines += wrapped(f"Left out of {name}: {', '.join(one['left_out'])}.")
        if counts := one.get("undefined_draws"):
            held = ", ".join(f"{c} in {count}" for c, count in counts.items())
            lines += wrapped(f"{name}: draws that held one label value only: {held}.")
    return lines


def compared(by_encoder: Mapping[str, Any], name: str | None) -> str:
    """The areas of both encoders and their difference, in 67 columns; of a class where named."""
    first, second, difference = (
        by_encoder[kind] if name is None else by_encoder[kind][name]
        for kind in ("pretrained", "untrained", "difference")
    )
    cells = [cell(first), cell(second)]
    return "  ".join([*cells, signed(difference)])


def cell(area: Mapping[str, float]) -> str:
    """A value with its interval, in 20 columns."""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**area)


def cut(name: str) -> str:
    """A name in as many columns as there are for it."""
    return f"{name if len(name) <= NAME else name[: NAME - 1] + '…':{NAME}}"


def wrapped(text: str) -> list[str]:
    """A sentence in lines that fit."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _notes(result: Mapping[str, Any]) -> list[str]:
    """What no figure speaks of, by name."""
    draws = result["settings"]["bootstrap"]["draws"]
    lines = []
    for words in remarks(result):
        lines += wrapped(words)
    for name, count in result["undefined_draws"].items():
        lines += wrapped(
            f"{name}: {count} of {draws} draws of patients held one label value only; its "
            "intervals and the mean's are without it there."
        )
    for name, why in result["left_out"].items():
        lines += wrapped(f"Left out: {name} ({why}).")
    if "overlap" in result:
        lines += wrapped(overlap_words(result["overlap"]))
    return lines
