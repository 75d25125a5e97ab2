"""The rows of metrics.jsonl in MLflow or W&B, where `run.track` asks for it.

Rank 0 sends its rows and, once, the settings, but for paths and names of files (`run`, `data`,
`train.init_from`). Over all its starts a run is one there too: its id is in `track.json`.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Protocol

from mlvicx_dist.config import PretrainConfig, flat, to_tree
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.storage import Place, is_local, read_bytes, write_whole

FILE = "track.json"
EXPERIMENT = "mlvicx_dist"
MOST_PARAMS = 100
"""What MLflow takes at once."""
PATIENCE_S = 30.0
"""How long the end of a run waits for the last rows to be sent."""
REMEMBERING = threading.Lock()
Row = Mapping[str, Any]


class Service(Protocol):
    """A run as a service has it."""

    def begin(self) -> None:
        """Go on with the run, or begin it."""
        ...

    def write(self, row: Row) -> None:
        """Add a row."""
        ...

    def end(self, finished: bool) -> None:
        """Nothing more comes of this start."""
        ...


class MLflow:
    """A run of a tracking server or database; the experiment is `MLFLOW_EXPERIMENT_NAME`'s."""

    def __init__(self, config: PretrainConfig, run_dir: Place) -> None:
        # Its own telemetry, and minutes of trying again.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._config, self._run_dir = config, run_dir
        self._params: list[Any] = []

    def begin(self) -> None:
        """Go on with the run, or create it and its experiment."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        address = self._config.run.track.mlflow
        self._client = MlflowClient(tracking_uri=address)
        known = _read(self._run_dir)
        key = f"mlflow {address}"
        if key in known:
            self._id = known[key]
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            there = self._client.get_experiment_by_name(name)
            experiment = there.experiment_id if there else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=self._config.run.name)
            self._id = run.info.run_id
            # At once: what fails from here on must not make another run.
            _remember(self._run_dir, key, self._id)
            self._params = [Param(k, str(value)) for k, value in _settings(self._config).items()]
        while self._params:
            self._client.log_batch(self._id, params=self._params[:MOST_PARAMS])
            del self._params[:MOST_PARAMS]

    def write(self, row: Row) -> None:
        """Its numbers as metrics of its step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(k, v, now_ms, row["step"]) for k, v in row.items() if k != "step"]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, finished: bool) -> None:
        """A run that is to go on is KILLED until it does."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class WandB:
    """A run of a W&B project; with WANDB_MODE=offline it stays in `wandb/` of the run's folder."""

    def __init__(self, config: PretrainConfig, run_dir: Place) -> None:
        # Its reports of its own errors.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._config, self._run_dir = config, run_dir

    def begin(self) -> None:
        """Go on with the run, or begin it, under an id of our own."""
        import wandb

        project = self._config.run.track.wandb
        known = _read(self._run_dir)
        key = f"wandb {project}"
        new = key not in known
        if new:
            known[key] = uuid.uuid4().hex[:12]
            _remember(self._run_dir, key, known[key])
        self._run = wandb.init(
            project=project,
            id=known[key],
            name=self._config.run.name,
            resume="allow",
            dir=str(self._run_dir) if is_local(self._run_dir) else tempfile.gettempdir(),
            config=_settings(self._config) if new else None,
            # No code, commit, command, host, load, output or list of packages.
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # Its own count of steps never falls; that of a run that goes on does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """As it is."""
        self._run.log(dict(row))

    def end(self, finished: bool) -> None:
        """A run that is to go on counts as crashed until it does."""
        self._run.finish(exit_code=0 if finished else 1)


SERVICES: dict[str, Callable[[PretrainConfig, Place], Service]] = {"mlflow": MLflow, "wandb": WandB}
"""By the key of `run.track`, which is the library and the extra too."""


def check_trackers(config: PretrainConfig) -> None:
    """Refuse a service whose library is not installed.

    Raises:
        ConfigError: it is missing.
    """
    for name in _wanted(config):
        if find_spec(name) is None:
            raise ConfigError(
                f"run.track.{name}: the library {name} is not installed here; install it with "
                f"pip install 'mlvicx_dist[{name}]' on every node, or leave the key out."
            )


@contextmanager
def tracking(
    config: PretrainConfig, run_dir: Place, *, start: int, total: int, say: Callable[[str], None]
) -> Iterator[Callable[[Row], None]]:
    """Send rows to what `run.track` names, in threads: training waits for no server.

    Args:
        config: The settings.
        run_dir: Folder of the run.
        start: Steps done before.
        total: Steps of the run: its row ends it.
        say: Told, in a sentence, that rows cannot be sent.
    """
    check_trackers(config)
    senders = [_Sender(name, config, run_dir, say) for name in _wanted(config)]
    last = start

    def write(row: Row) -> None:
        nonlocal last
        last = int(row["step"])
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        for sender in senders:
            sender.rows.put(numbers)

    try:
        yield write
    finally:
        for sender in senders:
            sender.end(last == total)


class _Sender:
    """The thread of a service; what it cannot send waits for the next row."""

    def __init__(
        self, name: str, config: PretrainConfig, run_dir: Place, say: Callable[[str], None]
    ) -> None:
        self.rows: SimpleQueue[Row | bool] = SimpleQueue()
        self._name, self._say = name, say
        self._thread = threading.Thread(target=self._send, args=(config, run_dir), daemon=True)
        self._thread.start()

    def end(self, finished: bool) -> None:
        """Wait for the last rows, but not for ever."""
        self.rows.put(finished)
        self._thread.join(PATIENCE_S)

    def _send(self, config: PretrainConfig, run_dir: Place) -> None:
        waiting: deque[Row] = deque()
        service: Service | None = None
        begun = told = ended = False
        while not ended:
            given = self.rows.get()
            ended = isinstance(given, bool)
            if not isinstance(given, bool):
                waiting.append(given)
            try:
                service = service or SERVICES[self._name](config, run_dir)
                if not begun:
                    service.begin()
                    begun = True
                while waiting:
                    service.write(waiting[0])
                    waiting.popleft()
                told = False
                if isinstance(given, bool):
                    service.end(given)
            # Whatever the library or its database raises: a thread would end without a word.
            except Exception as error:
                if not told:
                    said = str(error).strip().partition("\n")[0].rstrip(".")
                    why = said or type(error).__name__
                    self._say(
                        f"run.track.{self._name}: rows cannot be sent ({why[:200]}); training goes "
                        "on, they wait, and metrics.jsonl has all of them."
                    )
                told = True


def _wanted(config: PretrainConfig) -> list[str]:
    return [name for name in SERVICES if getattr(config.run.track, name) is not None]


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings by dotted key, without paths and names of files."""
    tree = to_tree(config)
    kept = {key: value for key, value in tree.items() if key not in ("run", "data")}
    kept["train"].pop("init_from")
    return flat(kept)


def _read(run_dir: Place) -> dict[str, str]:
    try:
        return dict(json.loads(read_bytes(run_dir / FILE)))
    except (FileNotFoundError, ValueError):
        return {}


def _remember(run_dir: Place, key: str, value: str) -> None:
    """Note the id of a service's run; each service has a thread."""
    with REMEMBERING:
        known = _read(run_dir) | {key: value}
        write_whole(run_dir / FILE, (json.dumps(known, indent=1) + "\n").encode())
