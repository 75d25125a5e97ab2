"""`mlvicx profile`: where the time of a training step goes, and a trace of a few steps.

The run's own workers train on its own data, and rank 0 is looked at. The table is of steps that
nothing else watches; the trace, which takes time itself, is of some more. What a backward waits for
the all-reduce of its gradients is the time that it takes less that of steps without one; rows
that are gathered in their place (`train.gather_rows`) are a part of `backward`.
"""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.errors import ConfigError, DataError
from mlvicx_dist.progress import progress
from mlvicx_dist.session import on_cluster, scratch
from mlvicx_dist.storage import told, write_whole
from mlvicx_dist.stream.loader import Batch
from mlvicx_dist.train.group import cluster, fitted, trainer
from mlvicx_dist.train.launch import absolute, check_model, check_workers
from mlvicx_dist.train.memory import check_memory
from mlvicx_dist.train.optim import make_optimizer
from mlvicx_dist.train.rows import telling
from mlvicx_dist.train.source import open_shards, steps_of, stream_of, with_classes
from mlvicx_dist.train.step import Member, TwoViews, make_model, prepare_process, train_step, wrap
from mlvicx_dist.train.worker import join, settings_of

WARM_UP = 3
"""Steps that do not count: memory still grows, kernels are chosen, loader processes start."""
TRACED = 3
"""Steps in the trace, at most."""
RATE = 1e-6
COLLECTIVES = ("gloo:", "nccl:")


@dataclass(frozen=True)
class Profile:
    """Where the time of a step of rank 0 goes.

    Attributes:
        world_size: Workers of the group.
        batch: Images of the global batch.
        step_s: The mean step, in seconds: batches come in bursts, of which a median sees nothing.
        parts: Mean seconds of each part of a step, in their order; in a group `all-reduce` is what
            `backward` would take less without it.
        collectives: How many calls a step makes to other workers.
        collectives_s: Seconds of them in a step, most of them beside other work.
        trace: The file of the trace.
    """

    world_size: int
    batch: int
    step_s: float
    parts: Mapping[str, float]
    collectives: int
    collectives_s: float
    trace: Path

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "world_size": self.world_size,
            "step_s": self.step_s,
            "images_per_s": self.batch / self.step_s,
            "parts_s": dict(self.parts),
            "collectives": {"count": self.collectives, "seconds": self.collectives_s},
            "trace": str(self.trace),
        }

    def lines(self) -> list[str]:
        """For people."""
        named = {**self.parts, "step": self.step_s}
        table = [
            f"{name:10} {1e3 * seconds:>10.1f} ms {seconds / self.step_s:>6.1%}"
            for name, seconds in named.items()
        ]
        workers = f"{self.world_size} worker{'s' if self.world_size > 1 else ''}"
        rate = f"{workers}: {self.batch / self.step_s:.3g} images/s"
        if self.collectives:
            rate += (
                f"; {self.collectives} collectives a step, {1e3 * self.collectives_s:.1f} ms in "
                "all parts (by the trace, most of it beside other work)"
            )
        return [*table, rate, f"trace: {self.trace} (open it in ui.perfetto.dev)"]


def profile_run(config: PretrainConfig, *, steps: int, out: str | Path) -> Profile:
    """Run some steps of a pretraining on its workers; nothing of a run is written.

    Args:
        config: The settings.
        steps: Steps that count in the table, from 1.
        out: The trace to write, gzip'ed JSON.

    Raises:
        UserError: what would stop the run too, or the trace cannot be written.
    """
    config, out = absolute(config), Path(out)
    if config.workers.min:
        raise ConfigError("workers.min: a profile is of one size of the group; leave it out.")
    if not out.parent.is_dir():
        raise _unwritten(out, f"there is no folder {out.parent}")
    check_workers(config)
    check_model(config)
    config = with_classes(config, open_shards(config))
    elsewhere = on_cluster()
    if not elsewhere:
        own = config.workers.num
        check_memory(config, own, node_workers=own, where="this machine")
    with cluster(config.workers), scratch("profile") as folder:
        channel = Path(folder) / "rows.jsonl"
        plan = {"settings": to_tree(config), "steps": steps, "check_memory": elsewhere}
        total = _total(steps, config.workers.num)
        with progress("profiling", total, "steps") as bar:

            def show(row: dict[str, Any]) -> None:
                for line in row.get("said", ()):
                    bar.say(line)
                bar.advance(int("step" in row))

            fit = trainer(profile_worker, plan, config.workers, channel, folder, resumes=False)
            found = fitted(
                fit,
                "The workers could not be profiled",
                channel=channel,
                show=show,
                wait_s=config.workers.wait_s,
            )
    try:
        write_whole(out, found.pop("trace"))
    except OSError as error:
        raise _unwritten(out, told(error)) from None
    return Profile(config.workers.num, config.train.batch_size, trace=out, **found)


def _unwritten(out: Path, why: str) -> DataError:
    return DataError(f"{out}: the trace cannot be written ({why}); give another path with --out.")


def profile_worker(plan: dict[str, Any]) -> dict[str, Any]:
    """Train some steps as one worker of a group and tell where their time went.

    Args:
        plan: `settings`, `steps`, `check_memory` and `guard`, as the driver wrote them.
    """
    config = settings_of(plan)
    member = join(config, check_room=plan["check_memory"])
    with telling(plan["guard"], member.rank) as tell:
        return _profiled(config, member, plan["steps"], tell)


def _profiled(
    config: PretrainConfig, member: Member, counted: int, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    prepare_process(config)
    traced = min(counted, TRACED)
    total = _total(counted, member.world_size)
    steps = steps_of(config, open_shards(config), member)
    model = make_model(config, member)
    optimizer = make_optimizer(model, config.train)
    wrapped = wrap(TwoViews(model), member, config.train)
    watch = Stopwatch(member.device)
    stream = stream_of(config, steps, member, start=0, stop=total)

    def step() -> None:
        with watch("data wait"):
            batch: Batch = next(stream)
        train_step(wrapped, optimizer, batch, RATE, config, member, watch)
        watch.split()
        tell({"step": batch.step + 1})

    for _ in range(WARM_UP):
        step()
    watch.steps()
    for _ in range(counted):
        step()
    parts, step_s = _means(watch.steps())
    kinds = [ProfilerActivity.CPU]
    if member.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as tracer:
        for _ in range(traced):
            step()
    watch.steps()
    if isinstance(wrapped, DistributedDataParallel):
        # The workers' weights part from here on, and are thrown away.
        with wrapped.no_sync():
            for _ in range(counted):
                step()
        parts = _with_all_reduce(parts, _means(watch.steps())[0]["backward"])
    calls, seconds = exchanged(tracer.events() or ())
    return {
        "step_s": step_s,
        "parts": parts,
        "collectives": calls // traced,
        "collectives_s": seconds / traced,
        "trace": _trace(tracer) if member.rank == 0 else b"",
    }


def _total(counted: int, world_size: int) -> int:
    """Steps of a profile."""
    return WARM_UP + counted + min(counted, TRACED) + (counted if world_size > 1 else 0)


def _means(timed: list[tuple[dict[str, float], float]]) -> tuple[dict[str, float], float]:
    """Seconds of each part of a step, and of the whole."""
    parts = {name: mean(parts[name] for parts, _ in timed) for name in timed[0][0]}
    return parts, mean(whole for _, whole in timed)


def _with_all_reduce(parts: dict[str, float], alone_s: float) -> dict[str, float]:
    """The parts with what the backward takes more than alone as one of its own, behind it."""
    waited = max(parts["backward"] - alone_s, 0.0)
    found = {}
    for name, seconds in parts.items():
        found[name] = seconds
        if name == "backward":
            found |= {name: seconds - waited, "all-reduce": waited}
    return found


def exchanged(events: Iterable[Any]) -> tuple[int, float]:
    """How many collectives are among the events of a trace, and their seconds.

    A GPU's collective is there twice, as the host begins it and as the device does it: that counts.
    """
    calls = [event for event in events if event.name.startswith(COLLECTIVES)]
    calls = [event for event in calls if event.device_type != DeviceType.CPU] or calls
    return len(calls), sum(event.time_range.elapsed_us() for event in calls) / 1e6


def _trace(tracer: profile) -> bytes:
    with tempfile.TemporaryDirectory(prefix="mlvicx-trace-") as folder:
        path = Path(folder) / "trace.json"
        tracer.export_chrome_trace(str(path))
        return gzip.compress(path.read_bytes(), 5)


class Stopwatch:
    """Times the parts of steps, each a span in a trace too; on CUDA by events of the stream.

    Between events the host does not wait for the device, so that a step runs as it always does.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._steps: list[list[tuple[str, Any, Any]]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Around one part of a step."""
        begin = self._now()
        with record_function(name):
            yield
        self._spans.append((name, begin, self._now()))

    def split(self) -> None:
        """A step ends here."""
        self._steps.append(self._spans)
        self._spans = []

    def steps(self) -> list[tuple[dict[str, float], float]]:
        """The seconds of each step's parts and of the whole, since the last time."""
        taken, self._steps = self._steps, []
        if self._cuda:
            torch.cuda.synchronize()
        return [
            (
                {name: self._seconds(begin, end) for name, begin, end in spans},
                self._seconds(spans[0][1], spans[-1][2]),
            )
            for spans in taken
        ]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) / 1e3 if self._cuda else end - begin)
