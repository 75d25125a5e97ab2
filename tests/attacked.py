"""A training under attack: started as a user starts it, watched through its sample log."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from samples import attempts
from small import SMALL

SETTINGS = """\
kind: pretrain
run: {{name: attacked, storage_path: {runs}, samples_path: {folder}/samples}}
data: {{shards: [{{path: {shards}}}], loader_workers: 1}}
train: {{batch_size: 8, epochs: {epochs}, optimizer: adamw, warmup_epochs: 1, log_every_steps: 5}}
workers: {{num: 2, start_timeout_s: 15, collective_timeout_s: 20, resize_after_s: 25}}
checkpoint: {{every_steps: {every}, keep: 2}}
"""
BATCH, EVERY = 8, 10


class Attacked:
    """A run in a process of its own."""

    def __init__(self, folder, shards, *, epochs=1000, runs=None, env=None, every=EVERY, sets=()):
        self.folder = Path(folder)
        self.runs = runs or self.folder / "runs"
        self.samples = self.folder / "samples"
        self.env = {**os.environ, **(env or {})}
        self.sets = sets
        self.config = self.folder / "run.yaml"
        self.config.write_text(
            SETTINGS.format(
                runs=self.runs, folder=self.folder, shards=shards, epochs=epochs, every=every
            )
            + SMALL
        )
        self.process = None

    def start(self, *more):
        """Start it, or start it again, perhaps with more options."""
        self.log = (self.folder / f"log{time.time_ns()}").open("w+")
        sets = [part for one in self.sets for part in ("--set", one)]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlvicx_dist",
                "pretrain",
                str(self.config),
                "--json",
                *sets,
                *more,
            ],
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=self.env,
            text=True,
        )

    def words(self):
        """What it said on stderr since it was started last."""
        self.log.seek(0)
        return self.log.read()

    def groups(self):
        return attempts(self.samples) if self.samples.is_dir() else []

    def step(self):
        """The newest step that the newest group has done whole."""
        groups = self.groups()
        return max(groups[-1].whole(), default=0) if groups else 0

    def reaches(self, step, *, within=120.0):
        """Wait until a step is done."""
        self.until(lambda: self.step() >= step, within=within, what=f"step {step}")

    def until(self, condition, *, within, what):
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"{what} was not reached: {self.words()[-3000:]}"
            assert self.process.poll() is None, f"it ended: {self.words()[-3000:]}"
            time.sleep(0.1)

    def pids(self):
        """The process of each rank of the newest group."""
        return self.groups()[-1].pids()

    def recovers(self, attack, *, within):
        """Attack, and wait for the next group's first step.

        Returns:
            Seconds from the attack to that step, and how many steps were done again.
        """
        before = len(self.groups())
        begin = time.time()
        attack()
        self.until(
            lambda: len(self.groups()) > before and self.groups()[-1].whole(),
            within=within,
            what="the next group's first step",
        )
        old, new = self.groups()[before - 1], self.groups()[before]
        first = max(row["time"] for row in new.steps[new.start + 1])
        return first - begin, max(old.whole()) - new.start

    def ends(self, *, within=240.0):
        """Wait for its end: the exit code and the document that it printed."""
        try:
            out, _ = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end: {self.words()[-3000:]}") from None
        return self.process.returncode, json.loads(out) if out.strip() else {}

    def stop(self):
        """Ask it to stop, as a scheduler does."""
        self.process.send_signal(signal.SIGTERM)
        return self.ends()

    def newest(self):
        """The file of its newest checkpoint."""
        return max((Path(self.runs) / "attacked" / "checkpoints").glob("step-*.pt"))

    def close(self):
        """End what is left of it."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
