"""The command line that all sharding scripts share: parse, list the images, pack, report.

Heavy imports stay inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlvicx_dist.answer import Answer, answered
from mlvicx_dist.errors import UserError

if TYPE_CHECKING:
    from mlvicx_dist.ingest.dicom_header import Rules
    from mlvicx_dist.ingest.shard_task import PackSettings
    from mlvicx_dist.ingest.sources.tables import Listing
    from mlvicx_dist.ingest.splits import Fractions


def run_sharding(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    list_records: Callable[[argparse.Namespace], Listing],
) -> int:
    """Run a sharding script; its exit code is that of `answered`, as `mlvicx` has it.

    Args:
        description: What `--help` says first.
        add_arguments: Adds the arguments of the source.
        list_records: From the arguments to the images.
    """
    parser = build_parser(description, add_arguments)
    options = parser.parse_args()

    def work() -> Answer:
        document = _pack(options, list_records)
        return Answer(document, _lines(document))

    return answered(
        work, name=parser.prog, as_json=options.json, stopped="stopped; the same command goes on"
    )


def build_parser(
    description: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    """What a sharding script understands: the arguments of its source, then those of all."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    _add_packing(parser)
    _add_dicom(parser)
    return parser


def _add_packing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("packing").add_argument
    add("--out", required=True, help="folder or URL of the shards to write")
    add("--workers", type=int, help="Ray tasks at once (default: all cores)")
    add("--short-side-px", type=int, default=256, help="of the stored images (%(default)s)")
    add("--format", choices=("jpeg", "png8", "png16"), default="jpeg", help="(%(default)s)")
    add("--quality", type=int, default=95, help="of JPEG (%(default)s)")
    add("--samples-per-shard", type=int, help="(default: 2048, less for a small set)")
    add("--fractions", default="0.7,0.1,0.2", help="of patients: train,val,test (%(default)s)")
    add("--no-official-splits", action="store_true", help="draw splits anew, by patient")
    add(
        "--near-duplicates",
        choices=("error", "drop", "allow"),
        default="error",
        help="copies of one image in two splits: stop, drop the earlier, or keep (%(default)s)",
    )
    add("--salt-file", help="of the keyed hashes (default: in your config folder)")
    add("--smallest-side-px", type=int, default=32, help="smaller is refused (%(default)s)")
    add("--max-refused", type=float, default=0.05, help="part of files left out (%(default)s)")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def _add_dicom(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which DICOM files are frontal chest radiographs").add_argument
    add("--modalities", default="CR,DX,DR", help="'any', or a list (%(default)s)")
    add("--body-parts", default="CHEST,THORAX,LUNG,TORAX", help="'any', or words (%(default)s)")
    add("--lateral", action="store_true", help="take lateral views too")
    add("--for-processing", action="store_true", help="take raw detector images too")
    add("--burned-in", action="store_true", help="take images with burned-in annotations too")
    add("--window", type=int, default=1, help="which window or VOI LUT, from 1 (%(default)s)")


def _pack(
    options: argparse.Namespace, list_records: Callable[[argparse.Namespace], Listing]
) -> dict[str, Any]:
    from pathlib import Path

    from mlvicx_dist.ingest.pack import pack, report_path
    from mlvicx_dist.ingest.record import load_salt
    from mlvicx_dist.progress import progress
    from mlvicx_dist.storage import place

    settings = _settings(options)
    out = place(options.out)
    if str(out).startswith("http"):
        raise UserError(
            f"--out {options.out}: http cannot be written; give a folder, s3:// or gs://."
        )
    source = getattr(options, "source", None)
    if source and f"{out}/".startswith(f"{place(source)}/"):
        raise UserError(f"--out {options.out}: it lies in the source; choose another folder.")
    given = load_salt(Path(options.salt_file)) if options.salt_file else None
    listing = list_records(options)
    salt = given or listing.salt or load_salt()
    with progress("packing", len(listing.records), "images") as bar:
        for note in listing.notes:
            bar.say(note)
        report = pack(
            listing.records,
            options.out,
            settings=settings,
            salt=salt,
            workers=options.workers,
            max_refused=options.max_refused,
            progress=bar,
        )
    return {
        "out": str(options.out),
        "notes": list(listing.notes),
        "splits": dict(report.manifest.splits),
        "classes": list(report.manifest.classes),
        "shards": len(report.manifest.shards),
        "bytes": sum(shard.bytes for shard in report.manifest.shards),
        "written": report.written,
        "kept": report.kept,
        "already_packed": report.already_packed,
        "refused": report.reasons(),
        "refused_list": str(report_path(out, "refused")),
    }


def _settings(options: argparse.Namespace) -> PackSettings:
    from mlvicx_dist.ingest.shard_task import PackSettings

    for name, least in (
        ("workers", 1),
        ("short_side_px", 32),
        ("samples_per_shard", 1),
        ("smallest_side_px", 1),
        ("window", 1),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more.")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality}: give 1 to 100.")
    if not 0 <= options.max_refused <= 1:
        raise UserError(f"--max-refused {options.max_refused}: give a part from 0 to 1.")
    return PackSettings(
        short_side_px=options.short_side_px,
        format=options.format,
        quality=options.quality,
        samples_per_shard=options.samples_per_shard,
        fractions=_fractions(options.fractions),
        official_splits=not options.no_official_splits,
        smallest_side_px=options.smallest_side_px,
        near_duplicates=options.near_duplicates,
        rules=_rules(options),
    )


def _rules(options: argparse.Namespace) -> Rules:
    from mlvicx_dist.ingest.dicom_header import Rules

    def listed(text: str) -> tuple[str, ...]:
        words = tuple(word.strip().upper() for word in text.split(",") if word.strip())
        return () if words == ("ANY",) else words

    return Rules(
        modalities=listed(options.modalities),
        body_parts=listed(options.body_parts),
        lateral=options.lateral,
        for_processing=options.for_processing,
        burned_in=options.burned_in,
        window=options.window - 1,
    )


def _fractions(text: str) -> Fractions:
    from mlvicx_dist.ingest.splits import Fractions

    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--fractions {text}: give three numbers, as in 0.7,0.1,0.2.") from None
    return Fractions(train, val, test)


def _lines(document: dict[str, Any]) -> list[str]:
    out, refused = document["out"], document["refused"]
    counts = ", ".join(f"{split} {count}" for split, count in document["splits"].items())
    what = (
        "was packed before"
        if document["already_packed"]
        else f"{document['written']} shards written, {document['kept']} kept from an earlier start"
    )
    megabytes, shards = document["bytes"] / 1e6, document["shards"]
    lines = [f"{out}: {counts} images, {megabytes:.1f} MB in {shards} shards; {what}."]
    if refused:
        reasons = ", ".join(f"{code} {count}" for code, count in refused.items())
        lines.append(f"Left out: {reasons}; {document['refused_list']} lists each file and why.")
    return [*lines, f"Next: mlvicx verify {out}"]
