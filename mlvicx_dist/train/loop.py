"""The training loop of one worker, top to bottom: resume, batch, step, log, look, checkpoint.

It knows its rank and its device, not Ray: `worker` tells it both. All state is the model, the
optimizer and the step; the data and the schedule are functions of the step (DESIGN 3.1, 5).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mlvicx_dist.config import PretrainConfig
from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.model.encoder import load_strictly
from mlvicx_dist.model.mlvicx import MLVICX
from mlvicx_dist.objective.wide_linear import align
from mlvicx_dist.storage import PATIENCE_S, Place, is_local, place, told
from mlvicx_dist.train.agreement import Agreement
from mlvicx_dist.train.checkpoint import (
    check_end,
    local_copy,
    newest_checkpoint,
    read_checkpoint,
)
from mlvicx_dist.train.metrics import Clock, Meter
from mlvicx_dist.train.notices import Notice, Notices, Regroup
from mlvicx_dist.train.optim import learning_rate, make_optimizer
from mlvicx_dist.train.runlog import RunLog, SampleLog, trained_s
from mlvicx_dist.train.saver import Saver
from mlvicx_dist.train.source import data_of, open_shards, steps_of, stream_of
from mlvicx_dist.train.step import (
    Member,
    TwoViews,
    make_model,
    prepare_process,
    random_model,
    train_step,
    wrap,
)
from mlvicx_dist.train.track import tracking
from mlvicx_dist.train.versions import bf16_in_software

Row = dict[str, Any]


class Judge(Protocol):
    """Judges the encoder while it is trained; every rank has one and calls it at the same steps."""

    def due(self, done: int) -> bool:
        """Whether it looks after `done` steps; it always does after the last one."""
        ...

    def __call__(self, model: MLVICX) -> Row:
        """What it finds, for the log row of the step; the model is left as it was."""
        ...


def train(
    config: PretrainConfig,
    run_dir: Place,
    member: Member,
    *,
    report: Callable[[Row], None],
    notices: Notices,
    fence: Callable[[], None] = lambda: None,
    judge: Judge | None = None,
) -> int:
    """Train from the newest whole checkpoint of `run_dir`, or from the start, to the last step.

    Args:
        config: The settings.
        run_dir: Folder of the run, which all workers see.
        member: This worker's rank, the group's size and its device.
        report: Called on every rank at the start, with each log row and with each message.
        notices: Who may ask the group to stop or to leave.
        fence: Raises, before something is written, if the run belongs to another driver by now.
        judge: Adds to the log rows of the steps at which it is due.

    Returns:
        The number of steps done; less than all of them where it was asked to stop.

    Raises:
        UserError: a shard cannot be read, the loss is not finite, or the run is beyond its end.
        Regroup: a group of another size is to go on.
    """
    prepare_process(config)
    said: list[str] = []
    _check_precision(config, member, said.append)
    shards = open_shards(config, patience_s=PATIENCE_S)
    steps = steps_of(config, shards, member)
    total = config.train.total_steps(steps.steps_per_epoch)
    agreement = Agreement(
        member.rank, member.world_size, timeout_s=config.workers.collective_timeout_s
    )
    newest = _newest(run_dir, member, said.append)
    model = make_model(config if newest is None else _without_source(config), member)
    optimizer = make_optimizer(model, config.train)
    resumed = (
        Resumed() if newest is None else _resume(newest, model, optimizer, config, said.append)
    )
    start = done = resumed.step
    check_end(run_dir, start, total)
    wrapped = wrap(TwoViews(model), member, config.train)
    meter = Meter(steps.lanes.stop - steps.lanes.start)
    clock = Clock(trained_s(run_dir, start, patience_s=PATIENCE_S) if member.rank == 0 else 0.0)
    begin = {"step": start, "steps": total, "world_size": member.world_size}
    report({**begin, "nodes": _nodes(member), "said": said})

    def say(words: str) -> None:
        # At once: after the last row of a run there is none that it could go with.
        report({"said": [words], "world_size": member.world_size})

    heard, saved = Notice.NONE, True
    with ExitStack() as stack:
        log_samples = _sample_log(config, member)
        run_log = saver = track = None
        if member.rank == 0:
            run_log = stack.enter_context(RunLog(run_dir, step=start, patience_s=PATIENCE_S))
            track = stack.enter_context(
                tracking(config, run_dir, start=start, total=total, say=say)
            )
            saver = stack.enter_context(
                Saver(
                    config,
                    run_dir,
                    model,
                    optimizer,
                    data_of(config, shards),
                    since_export=resumed.since_export,
                    say=say,
                    before=partial(_publish, fence, run_log),
                )
            )
        for batch in clock.waiting(stream_of(config, steps, member, start=start, stop=total)):
            rate = learning_rate(
                batch.step, settings=config.train, steps_per_epoch=steps.steps_per_epoch
            )
            if batch.step % steps.steps_per_epoch == 0:
                align(model)
            terms, representation = train_step(wrapped, optimizer, batch, rate, config, member)
            done = batch.step + 1
            meter.add(batch.step, terms, representation)
            log_samples(done, batch.samples)
            looked_at = judge is not None and (judge.due(done) or done == total)
            if done % config.train.log_every_steps == 0 or done == total or looked_at:
                row = {
                    "step": done,
                    "epoch": done / steps.steps_per_epoch,
                    "learning_rate": rate,
                    **meter.row(),
                    **clock.row(done, config.train.batch_size),
                }
                if judge is not None and looked_at:
                    with clock.aside():
                        row |= judge(model)
                if run_log:
                    _write_row(run_log, row, fence if is_local(run_dir) else None, say)
                if track:
                    track(row)
                newest = str(saver.newest) if saver and saver.newest else None
                report({**row, "steps": total, "checkpoint": newest})
            if saver and done < total:
                saver.look()
                if saver.due(done):
                    meter.settle()
                    saver.save(done)
            heard = agreement.heard(notices, stay=saver is not None and saver.failing)
            if heard in (Notice.REGROUP, Notice.STOP):
                break
        if saver and done > start:
            meter.settle()
            try:
                saver.finish(done, final=done == total)
            except CheckpointError:
                # A group that is to leave does so: the next one goes on from the checkpoint before.
                if heard is not Notice.REGROUP or done == total:
                    raise
                saved = False
        agreement.together()
    if heard is Notice.REGROUP and done < total:
        raise Regroup(done, saved)
    return done


def _nodes(member: Member) -> list[str]:
    """The name of each rank's node."""
    nodes = [platform.node()] * member.world_size
    if member.world_size > 1:
        dist.all_gather_object(nodes, platform.node())
    return nodes


def _check_precision(config: PretrainConfig, member: Member, say: Callable[[str], None]) -> None:
    """Say where bf16 costs time and gains none, or has no effect."""
    if config.train.precision == "bf16" and member.device.type == "cpu" and bf16_in_software():
        say(
            "this CPU computes bf16 in software, which takes some 20 times as long as float32; "
            "stop, and begin with train.precision=float32."
        )
    if config.train.gradients == "bf16" and member.world_size == 1:
        say("one worker exchanges no gradients: train.gradients has no effect.")


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from, beside weights and optimizer.

    Attributes:
        step: Steps done.
        since_export: Checkpoints since the last one with an export.
    """

    step: int = 0
    since_export: int = 0


def _newest(run_dir: Place, member: Member, say: Callable[[str], None]) -> Place | None:
    """The newest whole checkpoint, the same one on every rank; None: the run begins."""
    found: list[str | None] = [None]
    if member.rank == 0:
        newest = newest_checkpoint(run_dir, say, patience_s=PATIENCE_S)
        found = [str(newest) if newest else None]
    if member.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else place(found[0])


def _without_source(config: PretrainConfig) -> PretrainConfig:
    """The settings of a model whose weights a checkpoint has: their source may be out of reach."""
    train = config.train.model_copy(update={"init_from": None})
    return config.model_copy(update={"model": random_model(config), "train": train})


def _resume(
    path: Place,
    model: MLVICX,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    say: Callable[[str], None],
) -> Resumed:
    """Load a whole checkpoint."""
    # Rank 0 has looked at the digest; a copy of a remote one is looked at once a node.
    state = read_checkpoint(
        Path(path) if is_local(path) else local_copy(path, patience_s=PATIENCE_S)
    )
    load_strictly(model, state["model"], where=str(path))
    if state["settings"]["train"]["optimizer"] == config.train.optimizer:
        # The state is the checkpoint's, the options are the settings'.
        options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
    else:
        say(f"{path}: its optimizer was another one, so that {config.train.optimizer} starts anew.")
    return Resumed(int(state["step"]), int(state.get("since_export", 0)))


def _write_row(
    run_log: RunLog,
    row: Row,
    fence: Callable[[], None] | None,
    say: Callable[[str], None],
) -> None:
    """Log a row; where that cannot be, training goes on and the row is kept."""
    try:
        run_log.write(row, fence=fence)
    except OSError as error:
        say(f"step {row['step']}: the log cannot be written ({told(error)}); its rows wait.")


def _publish(fence: Callable[[], None], run_log: RunLog) -> None:
    """Before a checkpoint, the log of the steps that it has behind it."""
    fence()
    run_log.publish()


def _sample_log(config: PretrainConfig, member: Member) -> Callable[[int, torch.Tensor], None]:
    if config.run.samples_path is None:
        return lambda step, samples: None
    return SampleLog(config.run.samples_path, member.rank, member.world_size).write
