"""A server of shards that counts its bytes and fails on demand, and words for tests with it."""

import http.server
import multiprocessing
import threading
import time
from collections import defaultdict

import numpy as np
import torch

from mlvicx_dist.config import Views
from mlvicx_dist.storage import place
from mlvicx_dist.stream import cache as caches
from mlvicx_dist.stream.shardset import ShardSet, _index

VIEWS = Views(image_size_px=24, blur_kernel_px=5)
SPLITS = ["train", "val", "test"]
BLOCK = 4096
FORK = multiprocessing.get_context("fork")


class Store(http.server.ThreadingHTTPServer):
    """A folder over http with ranges, which counts the bytes of shards and fails on command."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.served, self.ranges = defaultdict(int), []
        self.ranged, self.pause_s = True, 0.0
        self.refused = self.manifest_refused = self.cut = self.spoilt = 0
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self._one = threading.Lock()

    def handle_error(self, request, client_address):
        pass

    def shard_bytes(self):
        return sum(count for name, count in self.served.items() if name.endswith(".tar"))

    def one_of(self, kind):
        """Whether this request is one of those that are to go wrong."""
        with self._one:
            left = getattr(self, kind)
            setattr(self, kind, max(left - 1, 0))
            return left > 0


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        store, name = self.server, self.path.strip("/")
        shard = name.endswith((".tar", ".npy"))
        if (shard and store.one_of("refused")) or (not shard and store.one_of("manifest_refused")):
            self.send_error(503)
            return
        path = store.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        first, whole = 0, len(data)
        if wanted and store.ranged:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if shard:
            store.ranges.append((name, first, len(data)))
            time.sleep(store.pause_s)
        if name.endswith(".tar"):
            if store.one_of("cut"):
                self.wfile.write(data[: len(data) // 2])
                return
            if store.one_of("spoilt"):
                data = bytes(len(data))
            if not store.go_on.is_set():
                self.wfile.write(data[: len(data) // 2])
                store.stalled.set()
                store.go_on.wait(30)
                data = data[len(data) // 2 :]
        store.served[name] += len(data)
        self.wfile.write(data)


class Clock:
    """Time for `storage` that passes only in its sleep."""

    def __init__(self):
        self.now_s, self.pauses_s = 0.0, []

    def monotonic(self):
        return self.now_s

    def sleep(self, pause_s):
        self.pauses_s.append(pause_s)
        self.now_s += pause_s


def forget():
    """As a later run: nothing is open and no warning was given."""
    caches._parts.clear()
    caches._warned.clear()
    _index.cache_clear()


def opened(store, cache):
    return ShardSet.open([store.url], splits=SPLITS, cache=cache)


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def same(first, second):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.samples, b.samples)
        for a, b in zip(first, second, strict=True)
    )


def read_to(shards, samples, barrier, path):
    barrier.wait()
    np.save(path, np.array([shards.image(sample).sum() for sample in samples]))


def upload(folder, url):
    for path in folder.iterdir():
        (place(url) / path.name).write_bytes(path.read_bytes())
    return url


def kept(cache, suffix):
    return sorted(path for path in cache.path().iterdir() if path.suffix == suffix)


def until(condition, *, seconds=20):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not come to that"
        time.sleep(0.01)
