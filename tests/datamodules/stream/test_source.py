"""Sources of bytes: files, HTTP servers and pipes, and every way in which each can fail."""

import os
import resource
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules.errors import BadSampleError
from datamodules.stream.index import read_manifest
from datamodules.stream.reading.source import HttpFile, LocalFile, PipeFile
from tests.helpers.tiny_shards import write_named_shards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_named_shards(tmp_path)


class Handler(BaseHTTPRequestHandler):
    """Serves a folder: `/ranges/x`, `/plain/x` without ranges, `/cut/x`, `/stall/x`, `/flaky/x`."""

    def do_GET(self):
        _, how, name = self.path.split("/", 2)
        path = self.server.folder / name  # pyright: ignore
        self.server.requests[how] += 1  # pyright: ignore
        if not path.exists():
            return self.send_error(404)
        if how == "flaky" and self.server.requests[how] % 2:  # pyright: ignore
            return self.send_error(503)
        data, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) and how != "plain":
            start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            data, status = data[start : end + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if how in ("cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if how == "stall":
                self.server.let_go.wait(20)  # pyright: ignore
            return None
        self.wfile.write(data)
        return None

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = shards[0].parent, Counter()  # pyright: ignore
    server.let_go = threading.Event()  # pyright: ignore
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"  # pyright: ignore
    yield server
    server.let_go.set()  # pyright: ignore
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("how", ["ranges", "plain", "flaky"])
def test_http_gives_what_files_give(shards, server, tmp_path, how):
    data = shards[0].read_bytes()
    source = HttpFile(f"{server.url}/{how}/0.tar", timeout_s=5.0)
    for start, end in ((0, 512), (1024, 5000), (512, 1024)):
        assert source.read(start, end) == data[start:end]
    source.close()
    if how != "flaky":
        manifest = read_manifest(f"{server.url}/{how}/{{0..4}}.tar", cache=tmp_path / "cache")
        assert len(manifest) == 112
        assert not manifest.faults
        requests = server.requests[how]
        again = read_manifest(f"{server.url}/{how}/{{0..4}}.tar", cache=tmp_path / "cache")
        assert again == manifest
        assert server.requests[how] == requests  # the index is stored


@pytest.mark.parametrize(
    ("how", "reason"),
    [("cut", "shard_cut"), ("stall", "shard_stalled"), ("ranges", "shard_missing")],
)
def test_http_faults(server, tmp_path, how, reason):
    name = "absent.tar" if reason == "shard_missing" else "0.tar"
    began = time.monotonic()
    url = f"{server.url}/{how}/{name}"
    source = HttpFile(url, timeout_s=0.2)
    with pytest.raises(BadSampleError) as caught:
        source.read(0, 2048)
    source.close()
    assert caught.value.reason == reason
    manifest = read_manifest(url, timeout_s=0.2, cache=tmp_path / "cache")
    assert [fault.reason for fault in manifest.faults] == [reason]
    assert time.monotonic() - began < 10


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(BadSampleError, match="shard_unreadable"):
        HttpFile("http://127.0.0.1:9/a.tar", timeout_s=0.5).read(0, 10)


def test_pipe_faults(shards):
    for command, reason in (
        (f"cat {shards[0]}; exit 3", "shard_unreadable"),
        ("sleep 30", "shard_stalled"),
        (f"head -c 2000 {shards[0]}", "tar_truncated"),
    ):
        pipe = PipeFile(command, timeout_s=0.3)
        with pytest.raises(BadSampleError) as caught:
            pipe.read(0, shards[0].stat().st_size + 10)
        pipe.close()
        assert caught.value.reason == reason


def test_a_pipe_goes_back_by_starting_again(shards):
    pipe, file = PipeFile(f"cat {shards[0]}", timeout_s=5.0), LocalFile(str(shards[0]))
    for start, end in ((0, 100), (5000, 9000), (200, 300)):
        assert pipe.read(start, end) == file.read(start, end)
    pipe.close()
    file.close()


def test_a_pipe_is_read_though_a_thousand_files_are_open(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, former[1]), former[1]))
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    pipe = PipeFile(f"cat {path}", timeout_s=5.0)
    try:
        assert pipe.read(10, 20) == bytes(range(10, 20))
    finally:
        pipe.close()
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, former)


@pytest.mark.parametrize("path", ["/dev/zero", "{}/folder.tar", "{}/fifo.tar", "{}/a\0b.tar"])
def test_what_is_no_file_is_no_hang(path, tmp_path):
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(BadSampleError) as caught:
        LocalFile(path.format(tmp_path))
    assert caught.value.reason == "shard_unreadable"
