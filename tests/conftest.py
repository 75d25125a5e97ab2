"""What tests share: the development data, where it is, and small shards of phantoms."""

import urllib.request
from pathlib import Path

import pytest

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


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on loopback with one empty bucket: its URL."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    # Its stores are those of the process: what an earlier test left goes.
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
