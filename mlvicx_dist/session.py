"""Ray for a command: the cluster it is connected to, or a private one here that ends with it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mlvicx_dist.capacity import check_resources, this_machine, whole_cluster
from mlvicx_dist.errors import DataError, ResourceError, first_line
from mlvicx_dist.stopping import sigterm_as_before
from mlvicx_dist.storage import temporary, write_whole

T = TypeVar("T")
R = TypeVar("R")

TOKEN = Path("~/.ray/auth_token")
"""Whoever has it can run anything on a private cluster."""
LONGEST_FOLDER = 40
"""The names of a session and a socket take 66 of the 107 bytes of a Unix socket's path."""
OBJECT_STORE_BYTES = 128 * 2**20
"""A private cluster's object store: neither images nor training data pass through it."""
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether Ray Train looks for nodes that are about to be taken away."""
PRIVATE = {
    # Ray's workers are nice by 15: beside any other busy process, one with two threads ran eight
    # times slower than at 0.
    "RAY_worker_niceness": "0",
    # Of a few trials' processes on two cores Ray would warn that they are many.
    "RAY_worker_maximum_startup_concurrency": "8",
    # Its one node is not taken away, and nobody reads Ray Train's metrics.
    WATCHER: "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""The environment of a private cluster's processes."""
MARK = "MLVICX_CLUSTER"
"""The variable by which a private cluster's processes are known."""
LEFT_S = 2.0
"""How long those that are left at its end may take to end by themselves."""


def on_cluster() -> bool:
    """Whether there is a cluster to run on: RAY_ADDRESS names one, or this is already inside."""
    import ray

    return bool(ray.is_initialized() or os.environ.get("RAY_ADDRESS"))


def connected() -> bool:
    """Whether RAY_ADDRESS names a cluster, as it does in a job; a private one is none."""
    return bool(os.environ.get("RAY_ADDRESS"))


def scratch(kind: str) -> tempfile.TemporaryDirectory[str]:
    """A folder that ends with a block; of a process that is killed it stays among Ray's logs."""
    import ray

    node = ray._private.worker._global_node
    session = node.get_session_dir_path() if node else None
    return tempfile.TemporaryDirectory(prefix=f"mlvicx-{kind}-", dir=session)


def on_this_node() -> dict[str, Any]:
    """Options of an actor that is this process's own: it must not go with another node, nor wait.

    Only few of them may be: none counts as work for a core.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


@contextmanager
def ray_session(
    needed: Mapping[str, float],
    *,
    asked: str,
    remedy: str,
    deaf: bool = False,
    dashboard: bool = False,
) -> Iterator[None]:
    """Connect to the cluster, or start a private one on this machine and end it with the block.

    Args:
        needed: The least of each resource, such as {"CPU": 4}.
        asked: What asks for them, for the sentence that refuses.
        remedy: What to lower.
        deaf: Whether a private cluster's processes do not hear SIGTERM, which schedulers send to a
            whole process group: this process can then still bring its work to an end. The cluster
            takes 4 s longer to end.
        dashboard: Whether a private cluster has one; Ray's cleaners need it where runs of Train
            are ended from outside.

    Raises:
        ResourceError: there is less, and an autoscaler would not add it; or no cluster answers.
        DataError: a private cluster's folder or token cannot be kept from others.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given, stack, mark = ray.is_initialized(), ExitStack(), secrets.token_hex(8)
    try:
        if on_cluster():
            if not given:
                _connect()
            check_resources(needed, whole_cluster(), "the cluster", asked, remedy)
        else:
            check_resources(needed, this_machine(), "this machine", asked, remedy)
            stack.enter_context(_defaults(PRIVATE))
            stack.callback(_end_left, mark)
            _start(mark, deaf=deaf, dashboard=dashboard)
        yield
    finally:
        if not given:
            ray.shutdown()
        stack.close()


def _end_left(mark: str) -> None:
    """End the processes of a private cluster that outlived it.

    Of eleven of Ray Train's controllers one hung in its own exit, hours after its run had ended.
    """
    end_s = time.monotonic() + LEFT_S
    while left := _marked(mark):
        if time.monotonic() > end_s:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)


def _marked(mark: str) -> list[int]:
    """The processes with a mark; none where the system does not tell."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextmanager
def _defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that this block has where the user gave none."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _start(mark: str, *, deaf: bool, dashboard: bool) -> None:
    import ray

    _hide_token()
    folder = _own_folder()
    # A blocked signal stays blocked in the processes that are started meanwhile.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if deaf else ())
    try:
        with (
            _defaults({MARK: mark}),
            _knowing_its_address() if dashboard else nullcontext(),
            sigterm_as_before(),
        ):
            ray.init(
                address="local",
                _temp_dir=folder,
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        # It reads every worker's log ten times a second, for drivers that show them.
        ray._private.worker._global_node.kill_log_monitor(check_alive=False)
    except Exception as error:
        # Ray has no class of its own for a node that does not come up in time.
        raise ResourceError(
            f"Ray does not start on this machine ({first_line(error).rstrip('.')}); see that "
            "cores, memory and the temp dir's disk are free, and run the same command again."
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _knowing_its_address() -> Iterator[None]:
    """The processes of a cluster that is started in this block are told its address.

    Ray's cleaners ask the cluster's dashboard. Where a second cluster is on the machine they would
    not know which one, and end: what an ended run of Train held would stay taken.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = dict(os.environ)
    os.environ |= {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    try:
        yield
    finally:
        for name in ("RAY_GCS_SERVER_PORT", "RAY_ADDRESS"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def _own_folder() -> str | None:
    """Where a private cluster has its sockets, logs and scratch; None: where RAY_TMPDIR says.

    Ray lets every user of the machine write into its folders, so they lie in one of this user's.
    """
    if "RAY_TMPDIR" in os.environ:
        return None
    folder = str(temporary("ray", "ray"))
    return folder if len(folder) <= LONGEST_FOLDER else str(temporary("ray", "ray", root="/tmp"))


def _hide_token() -> None:
    """See that the token, without which a cluster takes no work, is this user's alone.

    Ray, which asks for it by default, would make a file that others may read.
    """
    path = TOKEN.expanduser()
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    try:
        if path.exists():
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        elif not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, secrets.token_hex(32).encode(), mode=0o600)
    except OSError as error:
        raise DataError(
            f"{path}: the token of Ray cannot be kept from others ({error.strerror}); mend its "
            "rights, or give one as RAY_AUTH_TOKEN."
        ) from None


def _connect() -> None:
    import ray
    from ray.exceptions import RayError

    try:
        with sigterm_as_before():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise ResourceError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray cluster can be used there "
            f"({first_line(error).rstrip('.')}); correct the address or the token, or unset it to "
            "run on this machine."
        ) from None


def in_parallel(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int | None,
    cpus: float = 1,
    gpus: float = 0,
    remedy: str = "give fewer with --workers",
) -> Iterator[tuple[T, R]]:
    """Call a function on each task, as Ray tasks; (task, result) as they come.

    Args:
        function: A function of a module, which every node can import.
        tasks: Its arguments; only few more of them than there are workers are under way at a time.
        workers: How many at once; None: as many as there are cores. 1 needs no Ray, nor does a
            single task.
        cpus: Cores of each; 0 for those that only start others, of which `workers` run at once.
        gpus: GPUs of each; where it has some, a single task is Ray's too.
        remedy: What to do where workers die.

    Raises:
        ResourceError: a worker died three times.
        Exception: what the function raised; no further task is begun.
    """
    if not gpus and (workers == 1 or len(tasks) < 2):
        for task in tasks:
            yield task, function(task)
        return
    import ray
    from ray.exceptions import RayError, RayTaskError

    with ray_session({"CPU": 1}, asked="this command", remedy="give --workers 1"):
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(function)
        cores = int(ray.cluster_resources().get("CPU", 1))
        # Where all cores are at work, some tasks wait in line, so that no core waits for one.
        least = cores + cores // 8 + 1
        at_once = workers if workers and (workers < cores or not cpus) else least
        todo = iter(tasks)
        running = {remote.remote(task): task for task in islice(todo, at_once)}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                raise ResourceError(
                    f"a worker died three times ({type(error).__name__}), perhaps for want of "
                    f"memory; {remedy} and run the same command again."
                ) from None
            running |= {remote.remote(one): one for one in islice(todo, 1)}
            yield task, result
