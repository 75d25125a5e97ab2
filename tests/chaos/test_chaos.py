"""What happens to a run on a bad day: steps lost, time to go on, and no sample twice."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attacked import BATCH, EVERY, Attacked
from samples import check_epochs, trajectory

from mlvicx_dist.ingest.shards import read_manifest
from mlvicx_dist.storage import place

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
RECOVERY_S = 30.0


@pytest.fixture
def steps_per_epoch(phantom_shards):
    return read_manifest(phantom_shards).splits["train"] // BATCH


@pytest.fixture
def attacked(phantom_shards, tmp_path, request):
    made = []

    def make(**options):
        made.append(Attacked(tmp_path, options.pop("shards", phantom_shards), **options))
        return made[-1]

    yield make
    for run in made:
        run.close()


def kill(pid):
    return lambda: os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.alone
def test_a_machine_on_a_bad_day(attacked, steps_per_epoch):
    run = attacked()
    run.start()
    run.reaches(EVERY + 3)

    # A worker is killed.
    seconds, again = run.recovers(kill(run.pids()[1]), within=RECOVERY_S)
    note("worker killed", seconds, again)
    assert seconds < RECOVERY_S
    assert 0 <= again <= EVERY

    # A loader process is killed.
    run.reaches(run.step() + 5)
    groups = len(run.groups())
    os.kill(loaders(run.pids()[0])[0], signal.SIGKILL)
    run.reaches(run.step() + 15)
    assert len(run.groups()) == groups, "a lost loader is replaced, the group goes on"

    # A rank that is ten times slower slows the run, and that is all.
    with slowed(run.pids()[1], share=0.1):
        run.reaches(run.step() + 5)
    assert len(run.groups()) == groups

    # A rank that stands still is given up after workers.collective_timeout_s.
    seconds, again = run.recovers(
        lambda: os.kill(run.pids()[1], signal.SIGSTOP), within=20 + RECOVERY_S + 15
    )
    note("rank stopped", seconds, again)
    assert 0 <= again <= EVERY

    # SIGTERM: a checkpoint, and nothing is lost.
    run.reaches(run.step() + 3)
    code, document = run.stop()
    assert code == 128 + signal.SIGTERM
    stopped = run.step()
    assert document["stopped"]
    assert document["steps"] == stopped

    # The newest checkpoint is cut short: the one before is taken, and that is said.
    newest = run.newest()
    newest.write_bytes(newest.read_bytes()[:-100])
    epochs = stopped // steps_per_epoch + 4
    run.config.write_text(run.config.read_text().replace("epochs: 1000", f"epochs: {epochs}"))
    run.start("--accept-changes")
    code, document = run.ends()
    assert code == 0, run.words()
    assert "step-" in run.words()
    assert "is damaged" in run.words()
    assert stopped - EVERY <= document["resumed_from"] < stopped
    found, _ = trajectory(run.samples)
    assert max(found) == document["steps"] == epochs * steps_per_epoch
    check_epochs(found, steps_per_epoch, BATCH)


def note(event, seconds, again):
    """A figure for who runs this with -s."""
    sys.stdout.write(f"{event}: {seconds:.1f} s to the next step, {again} steps again\n")


def loaders(pid):
    """The loader processes of a worker."""
    with open(f"/proc/{pid}/task/{pid}/children") as main:
        found = [int(child) for child in main.read().split()]
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as children:
            found += [int(child) for child in children.read().split()]
    return sorted(set(found))


class slowed:  # noqa: N801
    """A process that runs only a share of the time."""

    def __init__(self, pid, *, share):
        self.pid, self.share = pid, share

    def __enter__(self):
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.turn)
        self.thread.start()

    def turn(self):
        while not self.ended.is_set():
            os.kill(self.pid, signal.SIGSTOP)
            time.sleep(0.2 * (1 - self.share))
            os.kill(self.pid, signal.SIGCONT)
            time.sleep(0.2 * self.share)

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()


def test_a_cluster_whose_nodes_come_and_go(attacked, laptop, s3_server, steps_per_epoch):
    # The nodes' processes take the store's address from this environment.
    laptop.up(nodes=2, cpus=1)
    run = attacked(
        env=laptop.env, runs=f"{s3_server.bucket}/runs", sets=["workers.min=1"], epochs=1000
    )
    run.start()
    run.reaches(EVERY + 3)
    assert run.groups()[-1].world_size == 2

    # A second driver of the cluster is refused.
    second = Attacked(run.folder, read_shards(run), env=laptop.env, runs=run.runs)
    second.start()
    code, _ = second.ends()
    assert code == 2
    assert "another process is at work on this run" in second.words()

    # A node is to be taken away: the group leaves it in time, without a step done again.
    seconds, again = run.recovers(lambda: laptop.drain(2, 60), within=90)
    note("node drained", seconds, again)
    assert run.groups()[-1].world_size == 1
    assert again == 0
    # An idle node that is drained ends by itself; else the cloud takes it.
    laptop.run("kill", 2, check=False)

    # Another node comes: the group grows.
    seconds, again = run.recovers(laptop.add, within=120)
    note("node added", seconds, again)
    assert run.groups()[-1].world_size == 2
    assert again == 0

    # A node dies without a word.
    run.reaches(run.step() + 5)
    seconds, again = run.recovers(lambda: laptop.kill(3), within=120)
    note("node killed", seconds, again)
    assert run.groups()[-1].world_size == 1
    assert 0 <= again <= EVERY

    # Past the steps that the dead group had done.
    run.reaches(run.step() + EVERY + 1)
    code, document = run.stop()
    assert code == 128 + signal.SIGTERM
    found, _ = trajectory(run.samples)
    assert max(found) == document["steps"]
    check_epochs(found, steps_per_epoch, BATCH)


def test_a_job_that_is_stopped_saves_first(attacked, laptop, steps_per_epoch):
    laptop.up(nodes=2, cpus=1)
    run = attacked(env=laptop.env)
    ray = Path(sys.executable).with_name("ray")
    job = ["--submission-id", "attacked", "--no-wait", "--", sys.executable, "-m", "mlvicx_dist"]
    subprocess.run(
        [ray, "job", "submit", *job, "pretrain", str(run.config)],
        env=run.env,
        check=True,
        capture_output=True,
    )
    deadline = time.monotonic() + 120
    while run.step() < 5 and time.monotonic() < deadline:
        time.sleep(0.2)
    stopped = subprocess.run(
        [ray, "job", "stop", "attacked"], env=run.env, check=True, capture_output=True, text=True
    )
    assert "was stopped" in stopped.stdout
    saved = int(run.newest().stem.removeprefix("step-"))
    assert saved == run.step() >= 5
    found, times = trajectory(run.samples)
    assert set(times.values()) == {1}
    check_epochs(found, steps_per_epoch, BATCH)


def test_a_store_that_is_lost_and_regained(attacked, phantom_shards, s3_server, steps_per_epoch):
    # Shards and run lie in the store; its absence is shorter than anybody's patience.
    upload(phantom_shards, s3_server)
    run = attacked(
        shards=f"{s3_server.bucket}/shards", runs=f"{s3_server.bucket}/runs", epochs=40, every=7
    )
    run.sets = ["checkpoint.every_s=5", f"data.cache_dir={run.folder / 'cache'}"]
    run.start()
    run.reaches(9)
    s3_server.stop()
    before = run.step()
    time.sleep(15)
    assert run.process.poll() is None
    s3_server.start()
    code, document = run.ends()
    assert code == 0, run.words()
    assert document["steps"] == 40 * steps_per_epoch
    assert "cannot be written" in run.words()
    assert "Training goes on" in run.words()
    found, times = trajectory(run.samples)
    assert set(times.values()) == {1}, f"nothing was done again after step {before}"
    check_epochs(found, steps_per_epoch, BATCH)


def test_a_shard_that_is_gone_stops_the_run_by_its_name(attacked, phantom_shards, tmp_path):
    shards = shutil.copytree(phantom_shards, tmp_path / "shards")
    run = attacked(shards=shards)
    run.start()
    run.reaches(3)
    gone = next(s.name for s in read_manifest(shards).shards if s.split == "train")
    (shards / gone).unlink()
    # Who has it open still reads it: the next group does not.
    os.kill(run.pids()[0], signal.SIGKILL)
    code, _ = run.ends()
    assert code == 2
    last = run.words().strip().splitlines()[-1]
    assert gone in last
    assert "mlvicx verify" in last
    assert "Traceback" not in run.words()


@pytest.mark.parametrize("small_disk", ["size=32m"], indirect=True)
def test_a_full_disk_under_a_run_stops_nothing(attacked, small_disk, steps_per_epoch):
    run = attacked(runs=small_disk, epochs=40)
    run.start()
    run.reaches(EVERY + 3)
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 2**17))
    run.until(lambda: "No space left" in run.words(), within=60, what="a full disk")
    filler.unlink()
    code, document = run.ends()
    assert code == 0, run.words()
    assert document["steps"] == 40 * steps_per_epoch
    found, times = trajectory(run.samples)
    assert set(times.values()) == {1}
    check_epochs(found, steps_per_epoch, BATCH)


@pytest.mark.parametrize("seed", range(3))
def test_a_week_of_kills(attacked, steps_per_epoch, seed):
    # Workers, loaders and drivers are killed at random moments until the run is through.
    chance = random.Random(seed)
    epochs = 60
    run = attacked(epochs=epochs, sets=["workers.max_failures=10"])
    run.start()
    for _ in range(8):
        if run.process.poll() is not None:
            break
        target = run.step() + chance.randint(1, 25)
        if target >= epochs * steps_per_epoch:
            break
        run.reaches(target)
        kind = chance.choice(["worker", "loader", "driver"])
        if kind == "driver":
            run.process.kill()
            run.process.wait()
            run.start()
            groups = len(run.groups())
            run.until(
                lambda before=groups: len(run.groups()) > before, within=120, what="a new group"
            )
            continue
        victim = chance.choice(list(run.pids().values()))
        if kind == "loader":
            victim = (loaders(victim) or [victim])[0]
        os.kill(victim, signal.SIGKILL)
        if kind == "worker":
            groups = len(run.groups())
            run.until(
                lambda before=groups: len(run.groups()) > before, within=120, what="a new group"
            )
    code, document = run.ends()
    assert code == 0, run.words()
    found, times = trajectory(run.samples)
    assert max(found) == document["steps"] == epochs * steps_per_epoch
    check_epochs(found, steps_per_epoch, BATCH)
    assert max(times.values()) <= 10


def upload(folder, server):
    """Put a folder of shards into the bucket."""
    for path in folder.iterdir():
        place(f"{server.bucket}/shards/{path.name}").write_bytes(path.read_bytes())


def read_shards(run):
    """The shards that a run was given."""
    return run.config.read_text().split("{path: ")[1].split("}")[0]
