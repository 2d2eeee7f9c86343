"""Shards behind a server, a pipe or a store: equal bytes, and no fault that waits forever."""

import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec.registry import known_implementations
from fsspec.spec import AbstractFileSystem

from datamodules.errors import BadSampleError
from datamodules.shards.synthetic import write_shards
from datamodules.stream.index import expand_urls, read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.source import FsspecFile, HttpFile, PipeFile, open_source
from datamodules.stream.reading.tar import untar_sample

TIMEOUT_S = 0.4
HANG_S = 30  # a read that takes longer counts as waiting forever


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [5, 3])
    return folder


class Handler(BaseHTTPRequestHandler):
    """A server. The first part of a path is the fault, the second part the shard."""

    def do_GET(self):
        _, how, name = self.path.split("/", 2)
        self.server.requests[how] += 1  # pyright: ignore
        data = (self.server.folder / name).read_bytes()  # pyright: ignore
        size = len(data)
        start, end = 0, size - 1
        if wanted := self.headers.get("Range"):
            start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        data = data[start : end + 1]
        if how in self.FAULTS:
            return self.FAULTS[how](self, data)
        shift = 512 if how == "elsewhere" else 0
        self.head(data, 206 if wanted else 200, f"bytes {start + shift}-{end + shift}/{size}")
        self.wfile.write(data)

    def head(self, data, status=200, given=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if given:
            self.send_header("Content-Range", given)
        self.end_headers()

    def wait(self):
        self.server.let_go.wait(HANG_S)  # pyright: ignore

    def slowly(self, data):
        """Sends one byte every tenth of a second: it is never silent for long, and never ends."""
        for byte in data:
            if self.server.let_go.wait(0.1):  # pyright: ignore
                return
            self.wfile.write(bytes([byte]))

    def silent(self, data):
        self.wait()

    def silent_in_head(self, data):
        self.wfile.write(b"HTTP/1.1 206 Partial Content\r\nContent-Le")
        self.wait()

    def silent_in_body(self, data):
        self.head(data, 206)
        self.wfile.write(data[: len(data) // 2])
        self.wait()

    def dribbling_head(self, data):
        self.slowly(b"HTTP/1.1 206 Partial Content\r\n" + b"X-Header: 0123456789\r\n" * 100)

    def dribbling_body(self, data):
        self.head(data, 206)
        self.slowly(data)

    def closing(self, data):
        self.close_connection = True

    def cutting(self, data):
        self.head(data, 206)
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def endless_redirect(self, data):
        self.send_response(302)
        self.send_header("Location", self.path)
        self.end_headers()

    def refusing(self, data):
        self.send_error(500)

    def gone(self, data):
        self.send_error(404)

    FAULTS = {  # noqa: RUF012 - never changed
        "silent": silent,
        "silent_in_head": silent_in_head,
        "silent_in_body": silent_in_body,
        "dribbling_head": dribbling_head,
        "dribbling_body": dribbling_body,
        "closing": closing,
        "cutting": cutting,
        "endless_redirect": endless_redirect,
        "refusing": refusing,
        "gone": gone,
    }

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Ignores errors: in these tests clients disconnect on purpose."""


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    server.folder, server.requests = folder, Counter()  # pyright: ignore
    server.let_go = threading.Event()  # pyright: ignore
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"  # pyright: ignore
    yield server
    server.let_go.set()  # pyright: ignore
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("silent", "shard_stalled"),
        ("silent_in_head", "shard_stalled"),
        ("silent_in_body", "shard_stalled"),
        ("dribbling_head", "shard_stalled"),
        ("dribbling_body", "shard_stalled"),
        ("closing", "shard_unreadable"),
        ("cutting", "shard_cut"),
        ("endless_redirect", "shard_unreadable"),
        ("refusing", "shard_unreadable"),
        ("elsewhere", "shard_unreadable"),
        ("gone", "shard_missing"),
    ],
)
def test_a_server_that_fails_has_a_reason_and_an_end(server, how, reason):
    source, began = HttpFile(f"{server.url}/{how}/shard-000000.tar", TIMEOUT_S), time.monotonic()
    with pytest.raises(BadSampleError) as caught:
        source.read(0, 4096)
    source.close()
    assert caught.value.reason == reason
    assert server.requests[how] >= (1 if how == "gone" else 3)
    assert time.monotonic() - began < HANG_S


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sleep 60", "shard_stalled"),
        ("exec 1>&-; sleep 60", "shard_stalled"),  # it closes its output, but does not exit
        ("while true; do printf x; sleep 0.05; done", "shard_stalled"),
        ("printf x; sleep 60 & exit 0", "shard_stalled"),  # its child keeps the pipe open
        ("exit 3", "shard_unreadable"),
        ("no-such-command", "shard_unreadable"),
        ("printf x", "tar_truncated"),
    ],
)
def test_a_pipe_that_fails_has_a_reason_and_an_end(command, reason, capfd):
    pipe, began = PipeFile(command, TIMEOUT_S), time.monotonic()
    with pytest.raises(BadSampleError) as caught:
        pipe.read(0, 4096)
    pipe.close()
    assert caught.value.reason == reason
    assert time.monotonic() - began < HANG_S


# --- stores of fsspec ----------------------------------------------------------------------------


@pytest.fixture
def store(folder):
    fs = fsspec.filesystem("memory")
    for path in sorted(folder.glob("*.tar")):
        fs.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield fs
    fs.rm("/bucket", recursive=True)


def read_all(patterns, cache) -> dict[str, dict]:
    manifest = read_manifest(patterns, cache=cache)
    assert not manifest.faults
    reader, samples = ShardReader(manifest, 5.0), {}
    for number, shard in enumerate(manifest.shards):
        for n in range(shard.count):
            raw = untar_sample(reader.read(number, n), "u")
            samples[raw["__key__"]] = raw
    reader.close()
    return samples


@pytest.mark.parametrize("pattern", ["memory://bucket/", "memory://bucket/*.tar",
                                     "memory://bucket/shard-{000000..000001}.tar"])  # fmt: skip
def test_a_store_gives_what_files_give(folder, store, tmp_path, pattern):
    assert len(expand_urls(pattern)) == 2
    assert read_all(pattern, tmp_path) == read_all(str(folder), tmp_path)


def test_a_store_is_read_by_range(folder, store):
    data = (folder / "shard-000000.tar").read_bytes()
    source = open_source("memory://bucket/shard-000000.tar", 5.0)
    assert isinstance(source, FsspecFile)
    for start, end in ((0, 512), (1024, 5000), (512, 1024)):
        assert source.read(start, end) == data[start:end]
    for start, end, reason in (
        (len(data) - 9, len(data) + 9, "tar_truncated"),
        (9, 9, "index_stale"),
    ):
        with pytest.raises(BadSampleError) as caught:
            source.read(start, end)
        assert caught.value.reason == reason


class Broken(AbstractFileSystem):
    """A store that fails in the way that its path says."""

    protocol = "broken"
    let_go = threading.Event()

    def cat_file(self, path, start=None, end=None, **kwargs):
        if path.endswith("stalled"):
            self.let_go.wait(HANG_S)
        if path.endswith("missing"):
            raise FileNotFoundError(path)
        raise RuntimeError("token expired\nsee the log")

    def info(self, path, **kwargs):
        return {"name": path, "size": len(self.cat_file(path)), "type": "file"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [("stalled", "shard_stalled"), ("missing", "shard_missing"), ("no", "shard_unreadable")],
)
def test_a_store_that_fails_has_a_reason_and_an_end(path, reason, tmp_path):
    fsspec.register_implementation("broken", Broken, clobber=True)
    Broken.let_go.clear()
    source, began = FsspecFile(f"broken://{path}", TIMEOUT_S), time.monotonic()
    with pytest.raises(BadSampleError) as caught:
        source.read(0, 512)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    manifest = read_manifest(f"broken://{path}", timeout_s=TIMEOUT_S, cache=tmp_path)
    assert [fault.reason for fault in manifest.faults] == [reason]
    Broken.let_go.set()
    assert time.monotonic() - began < HANG_S


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("nowhere://bucket/a.tar", "Protocol not known: nowhere"),
        ("memory://bucket/no-*.tar", "no file matches"),
        ("memory://nothing/", "no file matches"),
    ],
)
def test_a_store_that_cannot_be_read_is_one_line(url, advice):
    with pytest.raises(ValueError, match=advice) as caught:
        expand_urls(url)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(
        known_implementations,
        "cloudy",
        {"class": "no_such_package.CloudFS", "err": "Please install no_such_package"},
    )
    with pytest.raises(ValueError, match="install no_such_package with pip"):
        expand_urls("cloudy://bucket/a.tar")


@pytest.mark.skipif("ROPELAB_S3_URL" not in os.environ, reason="no S3 server is given")
def test_a_real_store(folder, tmp_path):
    """ROPELAB_S3_URL names a bucket (`s3://bucket`). fsspec's own variables have its address."""
    url = os.environ["ROPELAB_S3_URL"]
    fs = fsspec.filesystem("s3")
    for path in sorted(folder.glob("*.tar")):
        fs.pipe_file(f"{url}/shards/{path.name}", path.read_bytes())
    assert read_all(f"{url}/shards/", tmp_path) == read_all(str(folder), tmp_path)
    with pytest.raises(BadSampleError, match="shard_missing"):
        open_source(f"{url}/shards/absent.tar", 5.0).read(0, 512)
