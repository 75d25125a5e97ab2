"""The `mlvicx` command: parsing and printing, no logic.

Heavy imports stay inside the handlers, so that every `--help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from mlvicx_dist import __version__
from mlvicx_dist.answer import Answer, answered
from mlvicx_dist.errors import UserError

Handler = Callable[[argparse.Namespace], Answer]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code is that of `answered`."""
    options = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    return answered(lambda: options.handler(options), name="mlvicx", as_json=options.json)


def build_parser() -> argparse.ArgumentParser:
    """What `mlvicx` understands."""
    parser = argparse.ArgumentParser(
        prog="mlvicx",
        description="Self-supervised pretraining of chest X-ray encoders (MLVICX) on Ray.",
    )
    parser.add_argument("--version", action="version", version=f"mlvicx_dist {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument(
            "--json", action="store_true", help="print one JSON document on stdout, nothing else"
        )
        added.set_defaults(handler=handler)
        return added

    add = command(
        "demo", _demo, "phantoms -> shards -> pretrain -> probe -> report; no data, no GPU"
    )
    add.add_argument("--out", default="demo", help="folder of the demo (default: %(default)s)")

    add = command("pretrain", _pretrain, "pretrain an encoder; the same command again resumes")
    _add_config(add)
    add.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a run although its settings or data were others",
    )

    add = command(
        "sweep", _sweep, "try settings, judged by a probe; the same command again resumes"
    )
    _add_config(add)

    add = command(
        "compare",
        _compare,
        "train methods alike with several seeds and judge them; the same command again resumes",
    )
    _add_config(add)

    add = command("evaluate", _evaluate, "probe a frozen encoder beside the same one untrained")
    add.add_argument("checkpoint", help="a run, a checkpoint or an export folder")
    _add_config(add)
    add.add_argument("--out", help="folder of the result (default: the run's own)")

    add = command("embed", _embed, "write the embeddings of shards to a parquet file")
    add.add_argument("checkpoint", help="a run, a checkpoint or an export folder")
    add.add_argument("shards", nargs="+", help="shard folders")
    add.add_argument("--out", required=True, help="the parquet file to write")
    add.add_argument("--split", action="append", help="only this split; may be repeated")
    add.add_argument("--batch-size", type=_count, default=64, help="images a batch (%(default)s)")
    add.add_argument(
        "--loader-workers", type=_whole, default=1, help="loader processes (%(default)s)"
    )
    add.add_argument("--use-gpu", action="store_true", help="run the encoder on the GPU")

    add = command(
        "report", _report, "write the report of a run, a sweep or a comparison: one HTML page"
    )
    add.add_argument("run", help="the folder of the run, sweep or comparison")

    add = command("export", _export, "write an encoder as safetensors with its model card")
    add.add_argument("checkpoint", help="a run, a checkpoint or an export folder")
    add.add_argument("--out", required=True, help="the folder to write; not there yet, or empty")
    add.add_argument(
        "--onnx",
        action="store_true",
        help="write encoder.onnx too, compared with PyTorch (needs 'mlvicx_dist[onnx]')",
    )

    add = command(
        "verify", _verify, "check shards: digests, counts, every image, copies across splits"
    )
    add.add_argument("shards", help="a shard folder")
    add.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="SHARDS",
        help="look there too for copies of one image in two splits; may be repeated",
    )
    add.add_argument("--workers", type=_count, help="Ray tasks at once (default: all cores)")

    add = command(
        "doctor", _doctor, "look at this machine or at every node of a cluster, with the remedies"
    )
    _add_config(add, nargs="?")

    add = command(
        "plan", _plan, "foretell time, memory, bottleneck and cost of a run on GPUs or this CPU"
    )
    _add_config(add)
    add.add_argument("--gpus", type=int, metavar="N", help="how many (default: workers.num)")
    add.add_argument("--gpu-type", metavar="NAME", help="such as L4 or H100; cpu: this machine")
    add.add_argument("--cluster", metavar="FILE", help="take the machines of a cluster file")
    add.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a machine")
    add.add_argument("--network-gbit", type=float, metavar="G", help="a machine's, in Gbit/s")
    add.add_argument("--price-per-hour", type=float, metavar="P", help="of one GPU")
    add.add_argument("--images", type=int, metavar="N", help="of an epoch, instead of the shards'")

    add = command(
        "profile", _profile, "where the time of a training step goes: a table and a trace"
    )
    _add_config(add)
    add.add_argument("--steps", type=_count, default=10, help="steps that count (%(default)s)")
    add.add_argument("--out", default="trace.json.gz", help="the trace to write (%(default)s)")

    add = command(
        "inspect", _inspect, "draw a contact sheet: images, masks, boxes and the two views"
    )
    add.add_argument("shards", nargs="+", help="shard folders")
    add.add_argument("--out", default="contact.png", help="the PNG to write (%(default)s)")
    add.add_argument("--count", type=_count, default=8, help="images shown (%(default)s)")
    add.add_argument("--seed", type=int, default=0, help="which images and views (%(default)s)")
    add.add_argument("--config", help="take the views from this pretrain file")
    return parser


def _add_config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("config", nargs=nargs, help="a YAML file such as those in configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting, as in train.epochs=10; may be repeated",
    )


def _whole(text: str, least: int = 0) -> int:
    value = int(text) if text.isdecimal() else least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least}")
    return value


def _count(text: str) -> int:
    return _whole(text, 1)


def _demo(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.demo import demo

    result = demo(options.out)
    return Answer(result.document, result.lines, 0 if result.better else 1)


def _pretrain(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.config import PretrainConfig, load_as
    from mlvicx_dist.train.launch import pretrain

    config = load_as(PretrainConfig, options.config, options.overrides)
    outcome = pretrain(config, accept_changes=options.accept_changes)
    resumed = f", going on from step {outcome.resumed_from}" if outcome.resumed_from else ""
    follow = f"Next: mlvicx report {outcome.run_dir}"
    if outcome.already_finished:
        first = f"{outcome.run_dir}: this run is finished ({outcome.steps} steps); nothing to do."
    elif outcome.stopped_by:
        when = (
            f"at step {outcome.steps}{resumed}" if outcome.steps else "while no worker was at work"
        )
        first = f"{outcome.run_dir}: stopped {when}; nothing is lost."
        follow = "The same command goes on from there."
    else:
        first = f"{outcome.run_dir}: trained to step {outcome.steps}{resumed}."
    document = {
        "run": str(outcome.run_dir),
        "steps": outcome.steps,
        "resumed_from": outcome.resumed_from,
        "already_finished": outcome.already_finished,
        "stopped": bool(outcome.stopped_by),
        "changes": outcome.changes,
    }
    changed = [f"Other than before: {outcome.changes}."] if outcome.changes else []
    code = 128 + outcome.stopped_by if outcome.stopped_by else 0
    return Answer(document, [first, *changed, follow], code)


def _sweep(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.config import SweepConfig, load_as
    from mlvicx_dist.tune.launch import sweep

    config = load_as(SweepConfig, options.config, options.overrides)
    outcome = sweep(config)
    code = 128 + outcome.stopped_by if outcome.stopped_by else 0
    return Answer(outcome.document(), outcome.lines(), code)


def _compare(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.config import CompareConfig, load_as
    from mlvicx_dist.evaluate.compare import compare

    outcome = compare(load_as(CompareConfig, options.config, options.overrides))
    code = 128 + outcome.stopped_by if outcome.stopped_by else 0
    return Answer(outcome.document(), outcome.lines(), code)


def _evaluate(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.config import EvaluateConfig, load_as
    from mlvicx_dist.evaluate.evaluation import evaluate_checkpoint
    from mlvicx_dist.evaluate.summary import summary

    config = load_as(EvaluateConfig, options.config, options.overrides)
    result, path = evaluate_checkpoint(options.checkpoint, config, out=options.out)
    return Answer(result, [*summary(result), f"Written: {path}"])


def _embed(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.evaluate.embed import embed_to_parquet

    count, width = embed_to_parquet(
        options.checkpoint,
        options.shards,
        options.out,
        splits=options.split,
        batch_size=options.batch_size,
        loader_workers=options.loader_workers,
        use_gpu=options.use_gpu,
    )
    document = {"path": options.out, "images": count, "features": width}
    return Answer(document, [f"{options.out}: {count} embeddings of {width} numbers each."])


def _report(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.report.page import write_report

    path = write_report(options.run)
    return Answer({"report": str(path)}, [f"{path}: open it in a browser."])


def _export(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.export.command import export

    done = export(options.checkpoint, options.out, onnx=options.onnx)
    document = {"export": str(done.folder), "files": list(done.files), "notes": list(done.words)}
    return Answer(document, [f"{done.folder}: {', '.join(done.files)}", *done.words])


def _verify(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.ingest.shards import read_manifest
    from mlvicx_dist.ingest.verify import verify
    from mlvicx_dist.progress import progress

    manifest = read_manifest(options.shards)
    with progress("verifying", sum(s.samples for s in manifest.shards), "images") as bar:
        verdict = verify(
            options.shards, against=options.against, workers=options.workers, progress=bar
        )
    bad = bool(verdict.problems or verdict.leaks)
    return Answer(verdict.document(), verdict.lines(), 1 if bad else 0)


def _doctor(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.config import PretrainConfig, load_as
    from mlvicx_dist.doctor.examination import examine

    if options.overrides and not options.config:
        raise UserError(f"--set {options.overrides[0]}: it changes settings; give a CONFIG too.")
    config = load_as(PretrainConfig, options.config, options.overrides) if options.config else None
    diagnosis = examine(config)
    return Answer(diagnosis.document(), diagnosis.lines(), 0 if diagnosis.well else 1)


def _plan(options: argparse.Namespace) -> Answer:
    from dataclasses import fields

    from mlvicx_dist.config import PretrainConfig, load_as
    from mlvicx_dist.plan.command import make_plan
    from mlvicx_dist.plan.request import Request

    config = load_as(PretrainConfig, options.config, options.overrides)
    asked = {field.name: getattr(options, field.name) for field in fields(Request)}
    plan = make_plan(config, Request(**asked))
    return Answer(plan.document(), plan.lines())


def _profile(options: argparse.Namespace) -> Answer:
    from mlvicx_dist.config import PretrainConfig, load_as
    from mlvicx_dist.profile import profile_run

    config = load_as(PretrainConfig, options.config, options.overrides)
    found = profile_run(config, steps=options.steps, out=options.out)
    return Answer(found.document(), found.lines())


def _inspect(options: argparse.Namespace) -> Answer:
    from pathlib import Path

    from mlvicx_dist.config import PretrainConfig, Views, load_as
    from mlvicx_dist.report.contact import contact_sheet

    views = load_as(PretrainConfig, options.config).views if options.config else Views()
    sheet, shown = contact_sheet(options.shards, views, count=options.count, seed=options.seed)
    try:
        sheet.save(Path(options.out))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{options.out}: the picture cannot be written ({reason}); give a .png in a folder "
            "that exists."
        ) from None
    return Answer(
        {"sheet": options.out}, [f"{options.out}: {shown} images, each beside its two views."]
    )


if __name__ == "__main__":
    sys.exit(main())
