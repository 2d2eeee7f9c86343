"""Bytes a..b of one shard: by seek, by HTTP range, or by reading a pipe on.

Whatever goes wrong is a `BadSampleError` with one of five reasons: shard_missing,
shard_unreadable, shard_stalled, shard_cut, tar_truncated. Nothing waits for ever.
"""

import os
import select
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import requests

from datamodules.batch import BadSampleError

_PIECE = 1 << 16
_SLOWEST = 64 * 1024  # bytes a second; a server that dribbles below it counts as stalled
_TRIES = 3


@runtime_checkable
class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Source(ABC):
    """One shard, opened for reading. `in_order`: going back means to start again."""

    in_order = False

    @abstractmethod
    def read(self, start: int, end: int) -> bytes:
        """Exactly the bytes from `start` to `end`."""

    @abstractmethod
    def whole(self) -> Readable:
        """The shard from its first byte, to be read once."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what is open."""


class ForwardFile:
    """A file that can only be read on, over pieces that arrive. `position` counts bytes given."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._rest = b""
        self.position = 0

    def read(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            if not self._rest:
                self._rest = next(self._pieces, b"")
                if not self._rest:
                    break
            part, self._rest = self._rest[:missing], self._rest[missing:]
            parts.append(part)
            missing -= len(part)
        self.position += size - missing
        return b"".join(parts)

    def skip_to(self, position: int) -> None:
        while self.position < position and self.read(min(_PIECE, position - self.position)):
            pass


class LocalFile(Source):
    def __init__(self, path: str):
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            raise BadSampleError("shard_missing", "no such file", shard=path) from None
        except OSError as error:
            raise BadSampleError("shard_unreadable", error.strerror or "", shard=path) from None
        self._path = path

    def read(self, start: int, end: int) -> bytes:
        try:
            self._file.seek(start)
            data = self._file.read(end - start)
        except OSError as error:
            raise BadSampleError("shard_unreadable", error.strerror or "") from None
        return _exactly(data, start, end)

    def whole(self) -> Readable:
        return self._file

    def close(self) -> None:
        self._file.close()


class HttpFile(Source):
    """Range requests over kept-alive connections; a server without ranges is read from its start.

    A request that fails for a reason that may pass is tried three times.
    """

    def __init__(self, url: str, timeout_s: float):
        self._url, self._timeout_s = url, timeout_s
        self._session = requests.Session()

    def read(self, start: int, end: int) -> bytes:
        for attempt in range(_TRIES):
            try:
                file = ForwardFile(self._pieces(start, end))
                return _exactly(file.read(end - start), start, end)
            except BadSampleError as error:
                passing = error.reason in ("shard_unreadable", "shard_cut", "shard_stalled")
                if not passing or attempt == _TRIES - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("not reached")

    def whole(self) -> Readable:
        return ForwardFile(self._pieces(0, None))

    def _pieces(self, start: int, end: int | None) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"}  # offsets are those of the stored bytes
        if end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        began, received = time.monotonic(), 0
        try:
            with self._session.get(
                self._url, headers=headers, stream=True, timeout=self._timeout_s
            ) as response:
                _check_status(response)
                skip = start if response.status_code == 200 else 0
                for piece in response.iter_content(_PIECE):
                    received += len(piece)
                    if time.monotonic() - began > self._timeout_s + received / _SLOWEST:
                        raise requests.Timeout
                    skipped, skip = piece[skip:], max(0, skip - len(piece))
                    if skipped:
                        yield skipped
        except requests.RequestException as error:
            raise _http_fault(error, self._timeout_s) from None

    def close(self) -> None:
        self._session.close()


def _check_status(response: requests.Response) -> None:
    status = f"status {response.status_code}"
    if response.status_code in (404, 410):
        raise BadSampleError("shard_missing", status)
    if response.status_code == 416:
        raise BadSampleError("tar_truncated", f"{status}: the shard is shorter than its index")
    if response.status_code not in (200, 206):
        raise BadSampleError("shard_unreadable", status)


def _http_fault(error: requests.RequestException, timeout_s: float) -> BadSampleError:
    # requests reports a body that stalls as ConnectionError with the text of urllib3's timeout
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return BadSampleError("shard_stalled", f"nothing came for {timeout_s:g} s")
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return BadSampleError("shard_cut", "the connection ended before the data did")
    return BadSampleError("shard_unreadable", str(error).split("\n")[0][:200])


class PipeFile(Source):
    """The standard output of a shell command, as in webdataset's `pipe:` URLs."""

    in_order = True

    def __init__(self, command: str, timeout_s: float):
        self._command, self._timeout_s = command, timeout_s
        self._process: subprocess.Popen | None = None
        self._file: ForwardFile | None = None

    def read(self, start: int, end: int) -> bytes:
        if self._file is None or self._file.position > start:
            self.close()
            self._file = ForwardFile(self._pieces())
        self._file.skip_to(start)
        return _exactly(self._file.read(end - start), start, end)

    def whole(self) -> Readable:
        return ForwardFile(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        process = self._process = subprocess.Popen(
            self._command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # so that close() reaches the shell's children
        )
        assert process.stdout is not None
        while True:
            if not select.select([process.stdout], [], [], self._timeout_s)[0]:
                self.close()
                raise BadSampleError("shard_stalled", f"nothing came for {self._timeout_s:g} s")
            if not (piece := os.read(process.stdout.fileno(), _PIECE)):
                break
            yield piece
        if code := process.wait():
            raise BadSampleError("shard_unreadable", f"the command ended with status {code}")

    def close(self) -> None:
        process, self._process, self._file = self._process, None, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def open_source(url: str, timeout_s: float) -> Source:
    """Opens a shard. A local file is opened at once, the others at their first read."""
    if url.startswith("pipe:"):
        return PipeFile(url.removeprefix("pipe:"), timeout_s)
    if url.startswith(("http://", "https://")):
        return HttpFile(url, timeout_s)
    return LocalFile(url)


def is_remote(url: str) -> bool:
    return url.startswith(("pipe:", "http://", "https://"))


def _exactly(data: bytes, start: int, end: int) -> bytes:
    if len(data) != end - start:
        raise BadSampleError(
            "tar_truncated", f"the shard ends at byte {start + len(data)}, the sample at {end}"
        )
    return data
