"""The command line that all sharding scripts share: parse, list the images, pack, report.

Heavy imports stay inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlvicx_dist.errors import UserError

if TYPE_CHECKING:
    from mlvicx_dist.ingest.record import Record


def run_sharding(
    argv: Sequence[str] | None,
    *,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    list_records: Callable[[argparse.Namespace], list[Record]],
) -> int:
    """Run a sharding script; its exit code is 0 done, 2 the user's error, 3 too many refused.

    Args:
        argv: Arguments; None takes the process's own.
        description: What `--help` says first.
        add_arguments: Adds the arguments of the source.
        list_records: From the arguments to the images.
    """
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    _add_packing(parser)
    options = parser.parse_args(argv)
    try:
        document = _pack(options, list_records)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(document))
    else:
        print("\n".join(_lines(document)))
    return 0


def _add_packing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("packing").add_argument
    add("--out", type=Path, required=True, help="the folder of shards to write")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    add("--short-side-px", type=int, default=256, help="of the stored images (%(default)s)")
    add("--format", choices=("jpeg", "png8", "png16"), default="jpeg", help="(%(default)s)")
    add("--quality", type=int, default=95, help="of JPEG (%(default)s)")
    add("--samples-per-shard", type=int, default=2048, help="(%(default)s)")
    add("--fractions", default="0.7,0.1,0.2", help="of patients: train,val,test (%(default)s)")
    add("--no-official-splits", action="store_true", help="draw splits anew, by patient")
    add("--salt-file", type=Path, help="of the keyed hashes (default: in your config folder)")
    add("--max-refused", type=float, default=0.05, help="part of files left out (%(default)s)")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def _pack(
    options: argparse.Namespace, list_records: Callable[[argparse.Namespace], list[Record]]
) -> dict[str, object]:
    from mlvicx_dist.ingest.pack import PackSettings, pack
    from mlvicx_dist.ingest.record import load_salt
    from mlvicx_dist.progress import progress

    for name, least in (("workers", 1), ("short_side_px", 32), ("samples_per_shard", 1)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)}: give {least} or more.")
    if not 1 <= options.quality <= 100:
        raise UserError(f"--quality {options.quality}: give 1 to 100.")
    settings = PackSettings(
        short_side_px=options.short_side_px,
        format=options.format,
        quality=options.quality,
        samples_per_shard=options.samples_per_shard,
        fractions=_fractions(options.fractions),
        official_splits=not options.no_official_splits,
    )
    salt = load_salt(options.salt_file)
    records = list_records(options)
    with progress("packing", len(records), "images") as bar:
        report = pack(
            records,
            options.out,
            settings=settings,
            salt=salt,
            workers=options.workers,
            max_refused=options.max_refused,
            progress=bar,
        )
    return {
        "out": str(options.out),
        "splits": dict(report.manifest.splits),
        "classes": list(report.manifest.classes),
        "shards": len(report.manifest.shards),
        "bytes": sum(shard.bytes for shard in report.manifest.shards),
        "written": report.written,
        "kept": report.kept,
        "already_packed": report.already_packed,
        "refused": report.reasons(),
    }


def _fractions(text: str):  # type: ignore[no-untyped-def]
    from mlvicx_dist.ingest.splits import Fractions

    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--fractions {text}: give three numbers, as in 0.7,0.1,0.2.") from None
    return Fractions(train, val, test)


def _lines(document: dict[str, object]) -> list[str]:
    out, splits, refused = document["out"], document["splits"], document["refused"]
    assert isinstance(splits, dict) and isinstance(refused, dict)
    counts = ", ".join(f"{split} {count}" for split, count in splits.items())
    megabytes = int(str(document["bytes"])) / 1e6
    what = (
        "was packed before"
        if document["already_packed"]
        else (
            f"{document['written']} shards written, {document['kept']} kept from an earlier start"
        )
    )
    lines = [f"{out}: {counts} images, {megabytes:.1f} MB in {document['shards']} shards; {what}."]
    if refused:
        reasons = ", ".join(f"{code} {count}" for code, count in refused.items())
        lines.append(f"Left out: {reasons}; {out}/refused.csv lists each file and why.")
    return [*lines, f"Next: mlvicx verify {out}"]
