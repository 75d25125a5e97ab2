"""Damaged files that libraries answer with errors of every kind: refused, they end no job."""

import http.server
import io
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.pixels import read_image, store
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.refused import Refused
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.sources.phantom import write_phantoms


def saved(kind, **settings):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()


def tiff_with_an_empty_second_page():
    data = bytearray(saved("TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    struct.pack_into("<I", data, directory + 2 + 12 * entries, len(data))
    return bytes(data) + struct.pack("<HHHIII", 1, 305, 3, 1, 0, 0)


@pytest.mark.parametrize(
    "data",
    [tiff_with_an_empty_second_page(), saved("WEBP", exif=b"Exif\0\0II*\0\x08")],
    ids=["a second page without a size", "half of a pointer to EXIF"],
)
def test_a_garbled_picture_is_refused(data):
    with pytest.raises(Refused, match="unreadable: "):
        read_image(io.BytesIO(data))


def test_a_dicom_file_of_two_transfer_syntaxes_is_refused(tmp_path):
    write_phantoms(tmp_path, 1, size_px=64, dicom_fraction=1.0)
    (path,) = tmp_path.rglob("*.dcm")
    data = path.read_bytes()
    assert data.count(b"1.2.840.10008.1.2.1\0") == 1
    garbled = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1\\2.1\0")
    with pytest.raises(Refused, match="unreadable: the file names no transfer syntax, or several"):
        read_image(io.BytesIO(garbled))


def test_an_image_that_jpeg_cannot_hold_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(66000 * 32, dtype=np.uint8).reshape(32, 66000)).save(buffer, "PNG")
    settings = {"short_side_px": 64, "quality": 95, "smallest_side_px": 32}
    with pytest.raises(Refused, match="size: 66000 x 32 pixels are too long for JPEG"):
        store(buffer, format="jpeg", **settings)
    buffer.seek(0)
    assert store(buffer, format="png8", **settings).size == (66000, 32)


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers a few requests with an error before it gives the image."""

    code, left = 503, 0

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind = type(self)
        if kind.left:
            kind.left -= 1
            self.send_error(self.code)
            return
        data = saved("PNG")
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.mark.parametrize(
    ("code", "left", "reasons"),
    [(503, 2, {}), (403, 99, {"unreachable": 1}), (404, 99, {"missing": 1})],
)
def test_a_server_that_fails_for_a_while_has_lost_nothing(
    tmp_path, salt, monkeypatch, code, left, reasons
):
    monkeypatch.setattr(Failing, "code", code)
    monkeypatch.setattr(Failing, "left", left)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        record = Record(source="s", image_id="a", path=url, patient_id="p", labels={})
        local = tmp_path / "b.png"
        local.write_bytes(saved("PNG"))
        beside = Record(source="s", image_id="b", path=str(local), patient_id="p", labels={})
        settings = PackSettings(near_duplicates="allow")
        report = pack(
            [record, beside], tmp_path / "out", settings=settings, salt=salt, max_refused=1
        )
        server.shutdown()
    assert report.reasons() == reasons


@pytest.mark.parametrize("changes", [{"labels": {"Mass\nNodule": 1}}, {"source": "a\x1b[2J"}])
def test_a_name_that_no_manifest_may_hold_is_refused_before_the_packing(tmp_path, salt, changes):
    path = tmp_path / "a.png"
    path.write_bytes(saved("PNG"))
    about = {"source": "s", "labels": {}, **changes}
    record = Record(image_id="a", path=str(path), patient_id="p", **about)
    with pytest.raises(DataError, match=r"^/.*out: the class or source '.*control character"):
        pack([record], tmp_path / "out", settings=PackSettings(), salt=salt)
    assert not (tmp_path / "out").exists()
