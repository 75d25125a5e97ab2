"""Places: local, s3 and http; whole files or none; nothing that runs a shell."""

import fcntl
import functools
import http.server
import os
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import s3fs

from mlvicx_dist.cli import main
from mlvicx_dist.errors import DataError
from mlvicx_dist.storage import (
    _remove_left,
    becoming,
    files_below,
    listed,
    make_folder,
    place,
    read_bytes,
    temporary,
    write_whole,
)


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "s4://x/y", "ftp://x/y", "hdfs://x"])
def test_a_scheme_that_is_not_ours_is_refused(url):
    with pytest.raises(DataError, match="is no place that can be used"):
        place(url)


@pytest.mark.parametrize("text", ["~nosuchuser/x", "http://[bad/x", "a:" + "x" * 300])
def test_what_is_no_path_is_one_sentence(text):
    with pytest.raises(DataError, match=r": it is no path or URL \(.*\); give a folder"):
        place(text)


def test_a_file_url_is_an_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert place("file://shards") == tmp_path / "shards"
    assert place("file:///shards") == Path("/shards")


def test_local_paths_stay_paths(tmp_path):
    assert place(str(tmp_path)) == tmp_path
    assert place(f"file://{tmp_path}") == tmp_path
    odd = tmp_path / "a:b"
    odd.touch()
    assert place(str(odd)) == odd


def test_a_path_is_of_this_working_folder_wherever_it_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("a/b", Path("a/b")):
        assert place(given) == tmp_path / "a" / "b"
        assert place(given).is_absolute()
    assert place(Path("~/c")) == tmp_path / "home" / "c"
    remote = place("http://127.0.0.1:9/x")
    assert place(remote) is remote


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="boom"), becoming(tmp_path / "a") as partial:
        partial.write_bytes(b"half")
        raise ValueError("boom")
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "a", b"whole", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_files_of_a_folder_and_of_a_bucket_are_listed_alike(tmp_path, s3):
    for name in ("b/c.png", "a.png"):
        for folder in (tmp_path, place(f"{s3}/deep")):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            write_whole(folder / name, name.encode())
    assert files_below(tmp_path) == files_below(place(f"{s3}/deep")) == ["a.png", "b/c.png"]
    assert read_bytes(place(f"{s3}/deep") / "b" / "c.png") == b"b/c.png"
    with pytest.raises(FileNotFoundError):
        read_bytes(place(f"{s3}/deep/gone"))
    with pytest.raises(DataError, match="no such folder"):
        files_below(place(f"{s3}/shallow"))


def test_what_lies_in_a_folder_is_listed_alike(tmp_path, s3):
    for folder in (tmp_path / "deep", place(f"{s3}/deep")):
        assert listed(folder) == []
        make_folder(folder)
        write_whole(folder / "a.txt", b"a")
        assert listed(folder) == [folder / "a.txt"]
        assert read_bytes(listed(folder)[0]) == b"a"


def test_http_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert read_bytes(place(f"{url}/a.txt")) == b"text"
        with pytest.raises(FileNotFoundError):
            read_bytes(place(f"{url}/b.txt"))
        server.shutdown()


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed here")
def test_a_library_that_is_missing_is_named():
    with pytest.raises(DataError, match=r"gs://bucket/x: gs:// needs a library; pip install"):
        place("gs://bucket/x")


def test_a_store_that_cannot_be_reached_is_one_sentence(s3, monkeypatch, capsys):
    for command in (["verify", f"{s3}/gone"], ["inspect", f"{s3}/gone"]):
        assert main(command) == 2
        assert "there is no such folder of shards" in capsys.readouterr().err
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    assert main(["verify", f"{s3}/gone"]) == 2
    error = capsys.readouterr().err
    assert "it cannot be reached" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_temporary_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = temporary("order")
    assert folder.stat().st_mode & 0o777 == 0o700
    os.chown(folder, 12345, 12345)
    with pytest.raises(DataError, match="belongs to another user; set TMPDIR"):
        temporary("order")


def test_what_a_killed_process_left_of_a_remote_write_goes(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = temporary("partial")
    (folder / "left").write_bytes(b"x")
    with becoming(place(f"{s3}/first")) as first, becoming(place(f"{s3}/second")) as second:
        assert sorted(folder.iterdir()) == sorted([first, second])
        for path in (first, second):
            path.write_bytes(b"whole")
    assert list(folder.iterdir()) == []
    assert read_bytes(place(f"{s3}/first")) == read_bytes(place(f"{s3}/second")) == b"whole"


def test_a_remote_write_that_another_process_took_for_left_begins_again(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flock, removed = fcntl.flock, []

    def late(file, how):
        if how == fcntl.LOCK_EX and not removed:
            removed.extend(temporary("partial").iterdir())
            _remove_left(temporary("partial"))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with becoming(place(f"{s3}/a")) as partial:
        assert len(removed) == 1
        with partial.open("rb") as file, pytest.raises(BlockingIOError):
            flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.write_bytes(b"whole")
    assert read_bytes(place(f"{s3}/a")) == b"whole"
    assert list(temporary("partial").iterdir()) == []
