"""The result of a comparison as tables, for a terminal, for Markdown and for its page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlvicx_dist.evaluate.overlap import overlap_words
from mlvicx_dist.evaluate.summary import cell, cut, wrapped
from mlvicx_dist.evaluate.tables import signed
from mlvicx_dist.progress import duration

VIEWS = ("view AP", "view PA")
"""The subgroups of the terminal and of Markdown; the page and the JSON have all."""
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: A sentence above it.
        heads: Of its columns; the first names the rows.
        rows: Text, a cell a head.
        notes: Sentences below it.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def lines(result: Result) -> list[str]:
    """The result as text of at most 100 columns."""
    said: list[str] = []
    for table in tables(result):
        widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
        said += [*wrapped(table.title)]
        for row in [table.heads, *table.rows]:
            cells = [f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True)]
            said.append("  ".join([cut(row[0]), *cells]).rstrip())
        said += [line for note in table.notes for line in wrapped(note)]
    return said + [line for note in missing(result) for line in wrapped(note)]


def markdown(result: Result) -> list[str]:
    """The result as Markdown, for a page of documentation."""
    said: list[str] = []
    for table in tables(result):
        said += [table.title, "", f"| {' | '.join(table.heads)} |"]
        said.append("|" + " --- |" + " ---: |" * (len(table.heads) - 1))
        said += [f"| {' | '.join(row)} |" for row in table.rows]
        said += [line for note in table.notes for line in ("", note)]
        said.append("")
    return said + list(missing(result))


def tables(result: Result, groups: Sequence[str] = VIEWS) -> list[Table]:
    """The tables of every task, then what each method was given.

    Args:
        result: Of the comparison.
        groups: The subgroups that are shown, those with an image.
    """
    found = []
    for name, task in result["tasks"].items():
        found.append(_main(result, name, task))
        found += [
            _means(result, _share_title(name, share), share)
            for share in task["few_labels"]
            if "methods" in share
        ]
        for group in groups:
            one = task["subgroups"].get(group, {})
            if "methods" in one:
                title = f"{name}, {group}: {one['images']} images of {one['patients']} patients."
                found.append(_means(result, title, one))
    return [*found, _given(result)]


def _main(result: Result, name: str, task: Result) -> Table:
    reference = result["reference"]
    apart = task["difference"]["auroc"]
    rows = [
        [
            method,
            _seeds(result, method, task),
            cell(task["auroc"][method]["mean"]),
            signed(apart[method]["mean"]) if method in apart else "",
            cell(task["auprc"][method]["mean"]),
        ]
        for method in task["auroc"]
    ]
    count = len(task["classes"])
    by_fold = f" in {task['folds']} folds" if task["folds"] else ""
    title = (
        f"{name}: linear probe of the frozen encoder on {task['images']} images of "
        f"{task['patients']} test patients{by_fold}, {count} class{'es' if count > 1 else ''}; "
        f"{100 * result['confidence'][name]:g}% intervals over seeds and patients."
    )
    heads = ["method", "seeds", "AUROC", f"AUROC minus {reference}", "AUPRC"]
    return Table(title, heads, rows, list(_notes(result, task)))


def _seeds(result: Result, method: str, task: Result) -> str:
    """How many; raw pixels have none."""
    if result["methods"][method]["floor"] == "pixels":
        return ""
    return str(len(task["auroc"][method]["mean"]["seeds"]))


def _notes(result: Result, task: Result) -> Iterator[str]:
    best = task["over_best"]
    if best and best["auroc"]:
        yield (
            f"{_over(result['reference'], best['baseline'], best['auroc']['mean'])}, "
            f"AUPRC {signed(best['auprc']['mean'])}."
        )
    if any(len(one["mean"]["seeds"]) == 1 for one in task["auroc"].values()):
        yield "A method with one seed has an interval over patients alone."
    for name, count in task["undefined_draws"].items():
        yield (
            f"{name}: {count} draws of patients held one label value only; the intervals are "
            "without it there."
        )
    for name, why in task["left_out"].items():
        yield f"Left out: {name} ({why})."
    yield overlap_words(task["overlap"])
    for name in task["auroc"]:
        if result["methods"][name].get("init_from"):
            yield (
                f"{name}: of the images and labels behind the weights that it began with "
                "(train.init_from) nothing is known."
            )
    whose = "these images" if task["folds"] else "the validation or test images"
    too = "" if task["folds"] else ", from which the probe of this table may learn too,"
    for name, splits in _learned(result, task["auroc"]):
        yield (
            f"{name}: its encoder learned the labels of the split {' and '.join(splits)} of the "
            f"pretraining shards{too} and of no patient of {whose}. It is not among the others of "
            "which the best is taken."
        )


def _learned(result: Result, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Which of the methods learned labels, and of which splits."""
    for name in names:
        if splits := result["methods"][name].get("labels"):
            yield name, splits


def _over(reference: str, baseline: str, area: Result) -> str:
    return (
        f"{reference} minus {baseline}, of the others the best on the validation images: "
        f"AUROC {signed(area)}"
    )


def _share_title(name: str, share: Result) -> str:
    images = sum(share["images"]) / len(share["images"])
    return (
        f"{name}, few labels: {share['fraction']:.1%} of the training patients "
        f"({share['patients']}, about {images:.0f} images), {len(share['images'])} draws."
    )


def _means(result: Result, title: str, one: Result) -> Table:
    """Mean AUROCs and differences, of a share or a subgroup."""
    rows = [
        [method, cell(mean), signed(apart) if (apart := one["difference"].get(method)) else ""]
        for method, mean in one["methods"].items()
    ]
    notes = [
        f"{name}: its encoder learned all labels of the split {' and '.join(splits)}."
        for name, splits in _learned(result, one["methods"])
    ]
    if best := one.get("over_best"):
        notes.append(f"{_over(result['reference'], best['baseline'], best)}.")
    if one["left_out"]:
        notes.append(f"Left out: {', '.join(one['left_out'])}.")
    return Table(title, ["method", "AUROC", f"AUROC minus {result['reference']}"], rows, notes)


def _given(result: Result) -> Table:
    """What each method saw and took."""
    rows = []
    for name, method in result["methods"].items():
        runs = list(method["runs"].values())
        if not runs:
            why = "raw pixels" if method["floor"] == "pixels" else "not trained"
            rows.append([name, why if method["floor"] else "no step yet", "", ""])
            continue
        seconds = sum(run["trained_s"] for run in runs) / len(runs)
        # Runs of a method are of one length: a shorter one is under way.
        most = max(runs, key=lambda run: run["steps"])
        rows.append([name, str(most["steps"]), str(most["images"]), duration(seconds)])
    alike = "images" if result["budget"] == "images" else "time of training"
    title = f"What each run was given; all methods the same {alike}. Time is the mean of the seeds."
    return Table(title, ["method", "steps", "images seen", "time of training"], rows)


def missing(result: Result) -> Iterator[str]:
    """What is in no figure, by name."""
    waiting = [run for run, why in result["missing"].items() if not why.startswith("diverged")]
    for run, why in result["missing"].items():
        if why.startswith("diverged"):
            yield f"{run} {why.rstrip('.')}."
    if waiting:
        yield f"Not trained and judged yet: {', '.join(waiting)}."
