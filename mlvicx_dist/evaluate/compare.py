"""A comparison from its settings to its table: methods times seeds, each judged by every task.

Each method and seed is an ordinary run below `runs/`. What its probes say of the test images is a
file below `scores/`: the same command again goes on from whatever of these is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import yaml
from torch import nn

from mlvicx_dist.config import (
    PIXELS,
    SUPERVISED,
    CompareConfig,
    PretrainConfig,
    Task,
    parse_config,
    to_tree,
)
from mlvicx_dist.errors import ConfigError, DivergenceError
from mlvicx_dist.evaluate.budget import equal_time, measured
from mlvicx_dist.evaluate.compare_plan import COMPARISON, Plan, checked, make_plan
from mlvicx_dist.evaluate.compare_table import lines
from mlvicx_dist.evaluate.comparison import (
    RESULT,
    SETTINGS,
    TABLE,
    images_path,
    scores_path,
    write_diverged,
    write_found,
)
from mlvicx_dist.evaluate.embed import about_shards
from mlvicx_dist.evaluate.methods import Method
from mlvicx_dist.evaluate.overlap import label_overlap
from mlvicx_dist.evaluate.parts import splits_of
from mlvicx_dist.evaluate.pixels import Pixels
from mlvicx_dist.evaluate.task import (
    Images,
    images_of,
    read_images,
    score,
    write_images,
    write_scores,
)
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.progress import say
from mlvicx_dist.session import in_parallel, ray_session
from mlvicx_dist.storage import Place, make_folder, write_whole
from mlvicx_dist.stream.cache import cache_of
from mlvicx_dist.train.checkpoint import remove_checkpoints
from mlvicx_dist.train.fingerprint import (
    accept_fingerprint,
)
from mlvicx_dist.train.group import each
from mlvicx_dist.train.launch import (
    Outcome,
    pretrain,
    writing,
)
from mlvicx_dist.train.owner import once_free, only_driver
from mlvicx_dist.train.step import Member, make_model
from mlvicx_dist.train.weights import load_encoder

GOODBYE_S = 30.0
"""How long a driver that was just killed may still hold its run or comparison in a cluster."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` did.

    Attributes:
        folder: The comparison's folder.
        result: What is found so far, as JSON values.
        stopped_by: The signal that stopped it before its end, or 0.
    """

    folder: Place
    result: dict[str, Any]
    stopped_by: int = 0

    def document(self) -> dict[str, Any]:
        """For machines."""
        stopped = bool(self.stopped_by)
        return {"comparison": str(self.folder), "stopped": stopped, **self.result}

    def lines(self) -> list[str]:
        """For people."""
        if self.stopped_by:
            last = "Stopped; the same command goes on, and no finished run is lost."
        else:
            last = f"Next: mlvicx report {self.folder}"
        return [*lines(self.result), f"Written: {self.folder / RESULT}, {TABLE}.", last]


def compare(config: CompareConfig) -> Comparison:
    """Train and judge what has not been yet; the same call again goes on.

    Raises:
        UserError: something that the user can mend, said in one sentence.
        TrainingError: a run could not go on.
    """
    plan = make_plan(config)
    config, folder = plan.config, plan.folder
    stopped = 0
    with ExitStack() as stack:
        with writing(folder, "storage_path"):
            make_folder(folder)
            stack.enter_context(only_driver(folder, *COMPARISON))
            wanted = checked(plan)
        images = {task.name: _images(plan, task) for task in config.tasks}
        _check_labels(plan)
        with writing(folder, "storage_path"):
            # Not before the images are known: it would refuse the settings that mend a task.
            accept_fingerprint(folder, wanted)
            for name, one in images.items():
                if not images_path(folder, name).exists():
                    write_images(images_path(folder, name), one)
            settings = yaml.safe_dump(to_tree(config), sort_keys=False)
            write_whole(folder / SETTINGS, settings.encode())
        left = plan.left()
        trained = [(method, seed) for method, seed in left if not method.floor]
        for method, seed in left:
            if method.floor:
                _judge(plan, method, seed, images)
        if trained:
            _connect(plan, stack)
            stopped, steps = _steps(plan, trained)
            if not stopped:
                with _one_thread() if config.at_once > 1 else nullcontext():
                    stopped = _train(plan, trained, steps, images)
        result = write_found(plan.folder, config)
    return Comparison(folder, result, stopped)


def _images(plan: Plan, task: Task) -> Images:
    """What is known of a task's images, from the first start on."""
    images = read_images(images_path(plan.folder, task.name))
    if images is None:
        try:
            images = images_of(task, plan.config.pretrain)
        except ConfigError as error:
            raise ConfigError(f"tasks, {task.name}: {error}") from None
    return images


def _check_labels(plan: Plan) -> None:
    """See that no method is to learn the labels of patients that a task chooses or judges by.

    Raises:
        DataError: one is; names the task.
    """
    learners = {
        m.name: m for m, _ in plan.left() if not m.floor and m.settings.method == SUPERVISED
    }
    for name, method in learners.items():
        for task in plan.config.tasks:
            splits = splits_of(task) if task.folds else [task.data.val, task.data.test]
            unseen, _ = about_shards(
                task.data.shards, splits=list(dict.fromkeys(splits)), cache=cache_of(task.data)
            )
            where = f"methods.{name}, task {task.name}, its splits {', '.join(splits)}"
            label_overlap(unseen, [], task.data.shards, method.settings, where=where)


def _connect(plan: Plan, stack: ExitStack) -> None:
    """Ray for all runs, and the one driver of this comparison in a cluster."""
    import ray

    from mlvicx_dist.train.guard import guard

    workers = plan.config.pretrain.workers
    least = workers.min or workers.num
    stack.enter_context(
        ray_session(
            {kind: least * amount for kind, amount in each(workers).items()},
            asked="a run (pretrain.workers.num x pretrain.workers.cpus_per_worker)",
            remedy="lower pretrain.workers.num or pretrain.workers.cpus_per_worker",
            deaf=True,
        )
    )
    # The lock of a file system does not reach as far as a cluster.
    held = once_free(lambda: guard(str(plan.folder), *COMPARISON), GOODBYE_S)
    stack.callback(ray.kill, held)


def _steps(plan: Plan, trained: list[tuple[Method, int]]) -> tuple[int, dict[str, int | None]]:
    """A signal that came or 0, and the steps of each method's runs; None: the common length.

    A method that diverged while it was measured has none.
    """
    methods = list({method.name: method for method, _ in trained}.values())
    if plan.config.budget == "images":
        return 0, {method.name: None for method in methods}
    say("measuring the seconds of a step of each method")
    reference = next(method for method in plan.methods if method.name == plan.config.first)
    found = measured(plan.folder, methods, reference, plan.config.seeds[0])
    for name, cause in found.diverged.items():
        runs = [method.run(seed) for method, seed in trained if method.name == name]
        write_diverged(plan.folder, cause, *runs)
    return found.stopped_by, {**equal_time(plan.total, found.rates)}


def _train(
    plan: Plan,
    trained: list[tuple[Method, int]],
    steps: Mapping[str, int | None],
    images: Mapping[str, Images],
) -> int:
    """Train and judge what is left; the signal that stopped it, or 0."""
    runs = str(plan.folder / "runs")
    by_run = {method.run(seed): (method, seed) for method, seed in trained}
    trees = [to_tree(m.at(seed, runs, steps[m.name])) for m, seed in trained if m.name in steps]
    for number, (tree, outcome) in enumerate(
        in_parallel(run_one, trees, workers=plan.config.at_once, cpus=0, remedy="lower at_once"), 1
    ):
        name = tree["run"]["name"]
        if isinstance(outcome, str):
            write_diverged(plan.folder, outcome, name)
        elif outcome.stopped_by:
            return outcome.stopped_by
        else:
            _judge(plan, *by_run[name], images)
            # The export stays.
            remove_checkpoints(outcome.run_dir)
        say(f"{name}: {number} of {len(trees)} runs")
        write_found(plan.folder, plan.config)
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """What judges a run beside others takes one core.

    Threads that wait for each other would take the time of those that they wait for: two of them
    beside two runs made those, and the judging itself, two to three times as slow.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_one(tree: dict[str, Any]) -> Outcome | str:
    """Train one run to its end; how it diverged, in words, where it did."""
    config = parse_config(tree, f"the settings of {tree['run']['name']}")
    assert isinstance(config, PretrainConfig)
    try:
        return once_free(partial(pretrain, config), GOODBYE_S)
    except DivergenceError as error:
        return str(error)


def _judge(plan: Plan, method: Method, seed: int, images: Mapping[str, Images]) -> None:
    """Let every task that has not done so judge a run, and write down what it says."""
    tasks = plan.unjudged(method, seed)
    encoder = _encoder(plan, method, seed)
    size_px = plan.config.pretrain.views.image_size_px
    for task in tasks:
        say(f"judging {method.run(seed)} by {task.name}")
        try:
            scores = score(
                PIXELS if method.floor == PIXELS else method.name,
                encoder,
                task,
                images[task.name],
                size_px=size_px,
            )
        except DivergenceError as error:
            write_diverged(plan.folder, str(error), method.run(seed))
            return
        with writing(plan.folder, "storage_path"):
            write_scores(scores_path(plan.folder, task.name, method.run(seed)), scores)


def _encoder(plan: Plan, method: Method, seed: int) -> nn.Module:
    if method.floor == PIXELS:
        return Pixels()
    if not method.floor:
        return load_encoder(plan.folder / "runs" / method.run(seed))
    config = method.at(seed, str(plan.folder))
    model = make_model(config, Member(0, 1, torch.device("cpu")))
    return Encoder.from_model(model, config.views.image_size_px).eval()
