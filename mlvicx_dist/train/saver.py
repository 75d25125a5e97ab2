"""Checkpoints beside the training: the state is copied at a step, a thread writes the copy.

The training thread pays for the copy alone. A write that fails does not end a run: it is said and
tried again, and the checkpoint before it stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from mlvicx_dist.config import PretrainConfig, to_tree
from mlvicx_dist.errors import CheckpointError, DivergenceError
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.export_folder import save_export
from mlvicx_dist.model.mlvicx import MLVICX
from mlvicx_dist.storage import Place, told
from mlvicx_dist.train.card import model_card, training_record
from mlvicx_dist.train.checkpoint import clear_partial, save_checkpoint
from mlvicx_dist.train.versions import library_versions

AGAIN_S = 60.0
"""After a write that failed the next one is tried this soon, or at the next interval."""
LAST_PATIENCE_S = 300.0
"""How long the last checkpoint of a run is tried again."""


class Saver:
    """Writes the checkpoints and exports of a run; rank 0 has one.

    Attributes:
        newest: The checkpoint that was written last.
        failing: Whether the last one could not be written and is to be tried again.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run_dir: Place,
        model: MLVICX,
        optimizer: torch.optim.Optimizer,
        data: list[dict[str, Any]],
        *,
        since_export: int = 0,
        say: Callable[[str], None],
        before: Callable[[], None],
    ) -> None:
        """Get ready.

        Args:
            config: The settings.
            run_dir: Folder of the run, local or remote.
            model: What is saved; so is `optimizer`.
            optimizer: See `model`.
            data: What is trained on, see `source.data_of`.
            since_export: Checkpoints since the last one with an export, of the state gone on from.
            say: Called, in the training thread, with what went wrong and is tried again.
            before: Called, in the writing thread, before each checkpoint.
        """
        self.config, self.run_dir, self.model, self.optimizer = config, run_dir, model, optimizer
        self.data, self.say, self.before = data, say, before
        self.newest: Place | None = None
        clear_partial(run_dir)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlvicx-checkpoint")
        self._writing: Future[Place] | None = None
        self._copy: Any = None
        self._next_s = time.monotonic() + config.checkpoint.every_s
        self._since_export = since_export
        self._owed, self._saved = False, -1
        self.failing = False
        self._patience_s = min(LAST_PATIENCE_S, config.workers.collective_timeout_s / 2)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def due(self, done: int) -> bool:
        """Whether the state after `done` steps is to be saved."""
        every = self.config.checkpoint.every_steps
        if every and done % every == 0:
            self._owed = True
        # While one is being written nobody waits for it: the next step will do.
        return self._writing is None and (self._owed or time.monotonic() >= self._next_s)

    def save(self, done: int, *, final: bool = False) -> None:
        """Copy the state after `done` steps and have it written; waits for the write before it."""
        self.look(wait=True)
        self._copy = copied(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self._copy
        )
        arrived = None
        if any(weight.is_cuda for weight in self.model.parameters()):
            arrived = torch.cuda.Event()
            arrived.record()
        self._writing = self._thread.submit(self._write, done, arrived, final)
        self._next_s = time.monotonic() + self.config.checkpoint.every_s
        self._owed, self._saved = False, done

    def look(self, *, wait: bool = False) -> None:
        """See how the write goes; at every step.

        Raises:
            DivergenceError: the weights are not finite.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        try:
            self.newest = writing.result()
            self.failing = False
        except CheckpointError as error:
            self.failing = True
            again_s = min(AGAIN_S, self.config.checkpoint.every_s)
            self._next_s = time.monotonic() + again_s
            self.say(f"{error} Training goes on; it is tried again in {again_s:.0f} s.")

    def finish(self, done: int, *, final: bool) -> None:
        """Save the state after `done` steps and wait until it is there.

        The other ranks wait meanwhile, so that the patience is half of theirs at most.

        Raises:
            CheckpointError: it could not be written for that long.
            DivergenceError: the weights are not finite.
        """
        until_s, pause_s = time.monotonic() + self._patience_s, 1.0
        while True:
            if self._saved != done or final or self._writing is None:
                self.save(done, final=final)
            assert self._writing is not None
            writing, self._writing = self._writing, None
            try:
                self.newest = writing.result()
                return
            except CheckpointError as error:
                if time.monotonic() + pause_s > until_s:
                    raise
                self.say(f"{error} It is tried again in {pause_s:.0f} s.")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30.0)

    def _write(self, done: int, arrived: Any, final: bool) -> Place:
        """The copy as a checkpoint, in the writing thread."""
        if arrived is not None:
            arrived.synchronize()
        weights = self._copy["model"]
        if not all(bool(w.isfinite().all()) for w in weights.values() if w.is_floating_point()):
            raise DivergenceError(
                f"step {done}: the weights are not finite, so they are not saved; start again from "
                "the last checkpoint with a lower train.learning_rate_per_256."
            )
        try:
            self.before()
        except OSError as error:
            raise CheckpointError(
                f"{self.run_dir}: the run's log cannot be written ({told(error)}); "
                "free space or mend the access to it."
            ) from None
        every = self.config.checkpoint.export_every
        export = final or bool(every and self._since_export + 1 >= every)
        since_export = 0 if export else self._since_export + 1
        state = {
            "step": done,
            "since_export": since_export,
            **self._copy,
            "settings": to_tree(self.config),
            "manifests": [one["manifest"] for one in self.data],
            "data": self.data,
            "versions": library_versions(),
        }
        # The export first: where the last checkpoint stands, its export stands too.
        if export:
            folder = self.run_dir / "exports" / f"step-{done:08d}"
            encoder, training = self._encoder(), training_record(self.config, state)
            card = model_card(encoder, training)
            save_export(encoder, folder, card=card, known={"training": training})
        path = save_checkpoint(self.run_dir, state, keep=self.config.checkpoint.keep)
        self._since_export = since_export
        return path

    def _encoder(self) -> Encoder:
        """The encoder of the copy; no number is drawn for it, since training may draw some."""
        with torch.device("meta"):
            model = MLVICX(self.config.model.model_copy(update={"init": "random"}))
        model.load_state_dict(self._copy["model"], assign=True)
        return Encoder.from_model(model, self.config.views.image_size_px)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        # Whatever ended the run, a write that is under way becomes whole.
        self._thread.shutdown(wait=True)


def copied(tree: Any, into: Any = None) -> Any:
    """A tree of dicts and lists, its tensors copied to the CPU: into an earlier copy, if it fits.

    Copies from a GPU go to page-locked memory and are only begun: wait for an event.
    """
    if isinstance(tree, torch.Tensor):
        fits = isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (
            tree.shape,
            tree.dtype,
        )
        if not fits:
            into = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
        into.copy_(tree.detach(), non_blocking=True)
        return into
    if isinstance(tree, dict):
        old = into if isinstance(into, dict) else {}
        return {key: copied(value, old.get(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        same = isinstance(into, list | tuple) and len(into) == len(tree)
        there = into if same else [None] * len(tree)
        return type(tree)(copied(a, b) for a, b in zip(tree, there, strict=True))
    return tree
