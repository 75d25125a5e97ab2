"""What tests share: the development data, where it is, and small shards of phantoms."""

import logging
import os
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest

# Threads of OpenMP wait by spinning: two of each process on two cores hold each other up.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason=f"the development data is not at {SHARED}")
    for item in items:
        if "shared_data" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data():
    return SHARED


@pytest.fixture(scope="session")
def salt():
    return b"\x01" * 32


@pytest.fixture(scope="session")
def phantom_files(tmp_path_factory):
    """A folder of 60 drawn phantoms, some of them DICOM, with labels.csv."""
    from mlvicx_dist.ingest.sources.phantom import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 60, size_px=64)
    return folder


@pytest.fixture(scope="session")
def phantom_records(phantom_files):
    from mlvicx_dist.ingest.sources.anatomy import CLASSES
    from mlvicx_dist.ingest.sources.folder import Columns, list_csv

    table = phantom_files / "labels.csv"
    listing = list_csv(phantom_files, table, name="phantom", columns=Columns(), classes=CLASSES)
    return listing.records


@pytest.fixture(scope="session")
def phantom_shards(phantom_records, salt, tmp_path_factory):
    """The same packed into shards of eight."""
    from mlvicx_dist.ingest.pack import pack
    from mlvicx_dist.ingest.shard_task import PackSettings
    from mlvicx_dist.ingest.splits import Fractions

    out = tmp_path_factory.mktemp("packed") / "shards"
    settings = PackSettings(
        short_side_px=48, samples_per_shard=8, fractions=Fractions(0.5, 0.2, 0.3)
    )
    pack(phantom_records, out, settings=settings, salt=salt)
    return out


@pytest.fixture(scope="session")
def disc_shards(salt, tmp_path_factory):
    """Shards of noise with bright discs, their masks and boxes; see `discs`."""
    from discs import pack_discs

    return pack_discs(tmp_path_factory.mktemp("discs"), salt)


@pytest.fixture
def small_disk(request, tmp_path):
    """A disk of its own, as its parameter says: `size=8m`, or `nr_inodes=6` for few files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", request.param, "tmpfs"]
    done = subprocess.run(["mount", *options, disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no disk can be mounted here; root can")
    yield disk
    # Whoever still has a file open there keeps it.
    subprocess.run(["umount", "-l", disk], check=True)


class S3:
    """An S3 server on loopback with one empty bucket, which can be lost and regained."""

    bucket = "s3://bucket"

    def __init__(self):
        self._port = 0
        self.start()
        # Its stores are those of the process: what an earlier test left goes.
        urllib.request.urlopen(f"{self.url}/moto-api/reset", data=b"").close()

    def start(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        host, self._port = self._server.get_host_and_port()
        self.url = f"http://{host}:{self._port}"

    def stop(self):
        """As if it were unplugged; what is stored stays."""
        self._server.stop()
        self._server._server.server_close()


@pytest.fixture
def s3_server(monkeypatch):
    import s3fs

    from mlvicx_dist.stream import cache

    server = S3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    # What this process read from an earlier server of the same URLs knows that one's address.
    cache._place.cache_clear()
    s3fs.S3FileSystem().mkdir("bucket")
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def s3(s3_server):
    """The URL of an empty bucket."""
    return s3_server.bucket


class Laptop:
    """A Ray cluster of a few nodes on this machine, by cluster/laptop.sh; node 1 is its head.

    `env` is what a command needs to run on it: env={**os.environ, **laptop.env}. `nodes` has the
    address and the id of each node that was started, by its number.
    """

    def __init__(self):
        # Ray's sockets are below it, and their paths may have 107 bytes: pytest's are too long.
        self.folder = Path(tempfile.mkdtemp(prefix="laptop-", dir="/tmp"))
        self.env = {}

    def run(self, *arguments, check=True):
        script = Path(__file__).parents[1] / "cluster" / "laptop.sh"
        done = subprocess.run(
            [script, *map(str, arguments), "--dir", self.folder],
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check and done.returncode:
            pytest.fail(f"laptop.sh {arguments}: {done.stdout}{done.stderr}")
        return done

    @property
    def nodes(self):
        lines = (self.folder / "nodes.txt").read_text().splitlines()
        return {int(n): (ip, node_id) for n, _, _, ip, node_id in map(str.split, lines)}

    def up(self, nodes=2, cpus=1):
        lines = self.run("up", nodes, "--cpus", cpus).stdout.splitlines()
        self.env = dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def add(self):
        self.run("add")

    def kill(self, n):
        """End every process of node n at once."""
        self.run("kill", n)

    def drain(self, n, seconds):
        """Give notice of the end of node n: a node without work leaves the cluster at once, one
        with work stays, even past the time, until it is killed."""
        self.run("drain", n, seconds)

    def down(self):
        self.run("down")

    def processes(self):
        """The pids of what the cluster started that still run."""
        marker = b"MLVICX_LAPTOP=" + os.fsencode(self.folder)
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marker in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                pass
        return found


@pytest.fixture
def laptop():
    """A Laptop that is not up yet; it is down when the test ends."""
    if not Path("/proc/self").exists():
        pytest.skip("cluster/laptop.sh needs Linux")
    cluster = Laptop()
    yield cluster
    cluster.down()
    shutil.rmtree(cluster.folder, ignore_errors=True)
