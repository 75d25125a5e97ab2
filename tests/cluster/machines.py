"""Machines for tests: each with its own network, processes, /tmp and home, reached by SSH.

They share the disk otherwise, as machines share a network drive. All are on one bridge, on which
this process is 10.77.0.254. It needs root, and a network namespace that is nobody else's:
`make cluster-test` starts one.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from samples import attempts
from small import SMALL

ROOT = Path(__file__).parents[2]
LAPTOP = "10.77.0.254"
RUN = """\
kind: pretrain
run: {{name: {name}, storage_path: {folder}/runs, samples_path: {folder}/samples/{name}}}
data: {{shards: [{{path: {folder}/shards}}], loader_workers: 0}}
train: {{batch_size: 6, epochs: {epochs}, optimizer: adamw, warmup_epochs: 1, log_every_steps: 1}}
workers: {{num: {workers}, cpus_per_worker: {cpus}, start_timeout_s: 30}}
checkpoint: {{every_steps: 1000000, keep: 2}}
"""
SSHD = """\
Port 22
HostKey {folder}/hostkey
PidFile none
AuthorizedKeysFile {folder}/authorized
PermitRootLogin yes
StrictModes no
UsePAM no
"""
BOOT = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/sshd
{keep}
mount --rbind {own}/tmp /tmp
mount --bind {own}/passwd /etc/passwd
mount --bind {own}/hosts /etc/hosts
hostname {name}
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {laptop}
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""


def run(*command, **options):
    """Run a command that has to go well; its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout


def missing():
    """Why machines cannot be made here, or nothing."""
    if os.geteuid():
        return "machines need root"
    for program in ("/usr/sbin/sshd", "/usr/bin/rsync", "/usr/bin/ssh"):
        if not Path(program).exists():
            return f"{program} is missing: apt-get install openssh-server rsync"
    if not os.environ.get("MLVICX_OWN_NETWORK"):
        return "this is not a network of its own: see `make cluster-test`"
    return ""


class Machine:
    """One of them."""

    def __init__(self, lan, number):
        self.lan, self.number = lan, number
        self.name, self.address = f"node{number}", f"10.77.0.{number}"
        self.own = lan.folder / self.name
        self.home = self.own / "home"
        for folder in ("tmp", "home"):
            (self.own / folder).mkdir(parents=True)
        users = Path("/etc/passwd").read_text().splitlines()
        others = [line for line in users if not line.startswith("root:")]
        (self.own / "passwd").write_text(
            "\n".join([f"root:x:0:0:root:{self.home}:/bin/bash", *others]) + "\n"
        )
        hosts = [f"10.77.0.{n} node{n}" for n in range(1, 10)]
        (self.own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        # The environment is there: node.sh finds its packages installed.
        (self.home / "mlvicx").mkdir()
        (self.home / "mlvicx" / "venv").symlink_to(Path(sys.prefix))
        (self.home / ".bashrc").touch()
        self.start()

    def start(self):
        """Switch it on."""
        boot = BOOT.format(
            own=self.own,
            keep=self._kept(),
            name=self.name,
            address=self.address,
            laptop=LAPTOP,
            folder=self.lan.folder,
        )
        apart = ["--net", "--uts", "--ipc", "--pid", "--fork", "--mount", "--kill-child"]
        self.log = (self.own / "sshd.log").open("a")
        self.process = subprocess.Popen(
            ["unshare", *apart, "bash", "-c", boot], stdout=self.log, stderr=self.log
        )
        # The network is apart as soon as it is no longer this process's.
        theirs = Path(f"/proc/{self.process.pid}/ns/net")
        while theirs.readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.02)
        port = f"port{self.number}"
        run(
            "ip",
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.process.pid,
        )
        run("ip", "link", "set", port, "master", "lan", "up")
        until = time.monotonic() + 20
        while subprocess.run([*self.ssh, "true"], capture_output=True, check=False).returncode:
            if time.monotonic() > until:
                raise AssertionError(f"{self.name}: {(self.own / 'sshd.log').read_text()}")
            time.sleep(0.1)

    def _kept(self):
        """A checkout below /tmp is there in the machine's own one too."""
        if not ROOT.is_relative_to("/tmp"):
            return ""
        (self.own / ROOT.relative_to("/")).mkdir(parents=True, exist_ok=True)
        return f"mount --bind {ROOT} {self.own / ROOT.relative_to('/')}"

    @property
    def ssh(self):
        """The command that runs another one on it."""
        quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        return ["ssh", "-i", self.lan.key, *quiet, "-o", "LogLevel=ERROR", f"root@{self.address}"]

    def do(self, command):
        """What a command says in a login shell there."""
        return run(*self.ssh, f"bash --login -c {shlex.quote(f'. ~/.bashrc; {command}')}")

    def unplug(self):
        """Cut its cable."""
        run("ip", "link", "set", f"port{self.number}", "down")

    def plug(self):
        """Put it back in."""
        run("ip", "link", "set", f"port{self.number}", "up")

    def slow(self, megabits):
        """What it sends and gets passes at this rate."""
        rate = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
        run("tc", "qdisc", "add", "dev", f"port{self.number}", "root", "tbf", *rate)
        inside = ["nsenter", "-t", self.process.pid, "-n"]
        run(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *rate)

    def power_off(self):
        """End it and all of its processes at once."""
        self.process.kill()
        self.process.wait()
        self.log.close()
        # The cable goes with it, but not at once.
        cable = ["ip", "link", "del", f"port{self.number}"]
        subprocess.run(cable, capture_output=True, check=False)


class Lan:
    """The bridge, the machines on it, and the folder that all of them see, with its shards."""

    def __init__(self, shards):
        # Not below /tmp, of which each machine has its own.
        self.folder = Path(tempfile.mkdtemp(prefix="mlvicx-lan-", dir="/var/tmp"))
        self.key = str(self.folder / "key")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "hostkey")
        shutil.copy(self.key + ".pub", self.folder / "authorized")
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        shutil.copytree(shards, self.folder / "shards")
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "lan", "type", "bridge")
        run("ip", "addr", "add", f"{LAPTOP}/24", "dev", "lan")
        run("ip", "link", "set", "lan", "up")
        self.machines = []

    def add(self, count=1):
        """Switch machines on; the first is number 1."""
        for _ in range(count):
            self.machines.append(Machine(self, len(self.machines) + 1))
        return self.machines

    def config(self, name, *, epochs=2, workers=2, cpus=2):
        """The file of a small run of this name."""
        path = self.folder / f"{name}.yaml"
        settings = RUN.format(
            name=name, folder=self.folder, epochs=epochs, workers=workers, cpus=cpus
        )
        path.write_text(settings + SMALL)
        return path

    def groups(self, name):
        """The groups of workers that trained it so far."""
        folder = self.folder / "samples" / name
        return attempts(folder) if folder.is_dir() else []

    def step(self, name):
        """The last step that a whole group has done."""
        groups = self.groups(name)
        return max(groups[-1].whole(), default=0) if groups else 0

    def checkpoints(self, name):
        """Those that are whole."""
        return list((self.folder / "runs" / name / "checkpoints").glob("*.json"))

    def end(self):
        """Switch all off."""
        for machine in self.machines:
            if machine.process.poll() is None:
                machine.power_off()
        run("ip", "link", "del", "lan")
        shutil.rmtree(self.folder, ignore_errors=True)
