"""Reads bytes a..b of a shard: by seek, by an HTTP or fsspec range, or by reading a pipe forward.

Every failure is a `BadSampleError` with one of six reasons: shard_missing, shard_unreadable,
shard_stalled, shard_cut, tar_truncated, index_stale. Every wait has a timeout.
"""

import json
import os
import select
import signal
import stat
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import fsspec
import requests
import urllib3
from fsspec import AbstractFileSystem

from datamodules.errors import BadSampleError
from datamodules.stream.reading.patience import SLOWEST, Patience, persistently, within
from datamodules.stream.reading.tar import TarBytes

#: Environment variable for this process and its workers: JSON list of urls and schemes that may be
#: opened in addition to `_STORES`. It is set while a run directory is replayed, because that may
#: come from another user.
REPLAYED = "ROPELAB_REPLAYED"

#: Schemes that only fetch bytes.
_STORES = {"file", "local", "memory", "http", "https", "ftp", "sftp", "ssh", "smb", "hf"} | {
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hdfs", "webhdfs")
}

_PIECE = 1 << 16
_RANGE = 4 << 20  # bytes per request when a whole remote shard is read

T = TypeVar("T")


class Source(ABC):
    """One shard, opened for reading. If `in_order`, reading backwards restarts the shard."""

    in_order = False

    def read(self, start: int, end: int) -> bytes:
        """Returns exactly the bytes from `start` to `end`."""
        if not 0 <= start < end:
            raise BadSampleError("index_stale", f"it asks for bytes {start} to {end}: delete it")
        data = self._read(start, end)
        if len(data) != end - start:
            at = start + len(data)
            raise BadSampleError("tar_truncated", f"the shard ends at {at}, the sample at {end}")
        return data

    @abstractmethod
    def _read(self, start: int, end: int) -> bytes:
        """Returns the bytes from `start` to `end`, or fewer if the shard ends before `end`."""

    @abstractmethod
    def whole(self) -> TarBytes:
        """Returns the shard from its first byte, for one pass."""

    @abstractmethod
    def close(self) -> None:
        """Closes open files, connections and processes."""


class ForwardFile:
    """A forward-only file over a stream of byte pieces. `position` counts the returned bytes."""

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

    def seek(self, position: int) -> int:
        while self.position < position and self.read(min(_PIECE, position - self.position)):
            pass
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return False

    def push_back(self, data: bytes) -> None:
        self._rest = data + self._rest
        self.position -= len(data)


class LocalFile(Source):
    def __init__(self, path: str):
        try:
            # O_NONBLOCK: opening a named pipe would otherwise wait for its writer.
            self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
        except FileNotFoundError:
            raise BadSampleError("shard_missing", "no such file", shard=path) from None
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            text = getattr(error, "strerror", None) or str(error)
            raise BadSampleError("shard_unreadable", text, shard=path) from None
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise BadSampleError("shard_unreadable", f"no file; 'pipe:cat {path}'?", shard=path)

    def _read(self, start: int, end: int) -> bytes:
        try:
            size = os.fstat(self._file.fileno()).st_size  # so that read() allocates no more
            self._file.seek(min(start, size))
            return self._file.read(min(end, size) - min(start, size))
        except OSError as error:
            raise BadSampleError("shard_unreadable", error.strerror or "") from None

    def whole(self) -> TarBytes:
        return cast(TarBytes, self._file)

    def close(self) -> None:
        self._file.close()


class HttpFile(Source):
    """Reads a shard by HTTP range requests over keep-alive connections.

    A server without ranges is read from the start of the shard. A request with a temporary error
    is tried three times.
    """

    def __init__(self, url: str, timeout_s: float):
        self._url, self._timeout_s = url, timeout_s
        self._session = requests.Session()

    def _read(self, start: int, end: int) -> bytes:
        def read() -> bytes:
            data = ForwardFile(self._pieces(start, end)).read(end - start)
            if len(data) < end - start:
                raise BadSampleError("tar_truncated", f"the shard ends at {start + len(data)}")
            return data

        return persistently(read)

    def whole(self) -> TarBytes:
        return ForwardFile(self._pieces(0, None))

    def _pieces(self, start: int, end: int | None) -> Iterator[bytes]:
        patience = Patience(self._timeout_s)
        try:
            # The timeout of requests restarts at every byte of the response header.
            with within(2 * self._timeout_s, lambda: self._request(start, end)) as response:
                skip = _bytes_before(response, start)
                while True:
                    began = time.monotonic()
                    piece = response.raw.read1(_PIECE, decode_content=False)
                    if not piece:
                        break
                    patience.add(time.monotonic() - began, len(piece))
                    skipped, skip = piece[skip:], max(0, skip - len(piece))
                    if skipped:
                        yield skipped
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _http_fault(error, patience) from None

    def _request(self, start: int, end: int | None) -> requests.Response:
        headers = {"Accept-Encoding": "identity"}  # offsets refer to uncompressed bytes
        if end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        return self._session.get(self._url, headers=headers, stream=True, timeout=self._timeout_s)

    def close(self) -> None:
        self._session.close()


def _bytes_before(response: requests.Response, start: int) -> int:
    """Returns the number of bytes in a response before `start`. Raises for a bad response."""
    code = response.status_code
    if code in (404, 410):
        raise BadSampleError("shard_missing", f"status {code}")
    if code == 416:
        raise BadSampleError("tar_truncated", f"status {code}: the shard is shorter than its index")
    if code == 200:
        return start
    given = response.headers.get("Content-Range", f"bytes {start}-")
    if code != 206 or not given.startswith(f"bytes {start}-"):
        raise BadSampleError("shard_unreadable", f"status {code}, {given} for bytes {start}-")
    return 0


def _http_fault(error: Exception, patience: Patience) -> BadSampleError:
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    if isinstance(error, timeouts) or "timed out" in str(error):
        return patience.lost()
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return BadSampleError("shard_cut", "the connection ended before the data did")
    return BadSampleError("shard_unreadable", str(error))


class PipeFile(Source):
    """Reads a shard from the standard output of a shell command, like webdataset's `pipe:` URLs."""

    in_order = True

    def __init__(self, command: str, timeout_s: float):
        self._command, self._timeout_s = command, timeout_s
        self._process: subprocess.Popen | None = None
        self._file: ForwardFile | None = None

    def _read(self, start: int, end: int) -> bytes:
        if self._file is None or self._file.position > start:
            self.close()
            self._file = ForwardFile(self._pieces())
        self._file.seek(start)
        return self._file.read(end - start)

    def whole(self) -> TarBytes:
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
        patience = Patience(self._timeout_s)
        arrival = select.poll()  # select() fails above 1024 open files
        arrival.register(process.stdout, select.POLLIN)
        while True:
            began = time.monotonic()
            if not arrival.poll(1000 * self._timeout_s):
                self.close()
                raise patience.lost()
            if not (piece := os.read(process.stdout.fileno(), _PIECE)):
                break
            patience.add(time.monotonic() - began, len(piece))
            yield piece
        try:
            code = process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise BadSampleError("shard_stalled", "the command gives nothing and stays") from None
        if code:
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


class FsspecFile(Source):
    """A shard in any store of fsspec: s3://, gs://, az://, hdfs://, sftp://, memory://."""

    def __init__(self, url: str, timeout_s: float):
        self._url, self._timeout_s = url, timeout_s

    def _read(self, start: int, end: int) -> bytes:
        def read() -> bytes:
            def cat(fs: AbstractFileSystem, path: str) -> bytes:
                return cast(bytes, fs.cat_file(path, start=start, end=end))

            try:
                return self._ask(cat, end - start)
            except BadSampleError as error:
                # Each store has its own error for a range after the end of the file.
                if error.reason == "shard_unreadable" and self._size() <= start:
                    return b""
                raise

        return persistently(read)

    def _size(self) -> int:
        return self._ask(lambda fs, path: fs.info(path)["size"])

    def whole(self) -> TarBytes:
        return ForwardFile(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        size = self._size()
        for start in range(0, size, _RANGE):
            yield self.read(start, min(start + _RANGE, size))

    def _ask(self, call: Callable[[AbstractFileSystem, str], T], size: int = 0) -> T:
        try:
            seconds = self._timeout_s + size / SLOWEST
            # Make the file system where it is used: most do not survive a fork.
            return within(seconds, lambda: call(*fsspec.url_to_fs(self._url)))
        except BadSampleError:
            raise
        except FileNotFoundError:
            raise BadSampleError("shard_missing", "no such file") from None
        except TimeoutError:
            raise BadSampleError("shard_stalled", "the store answers too late") from None
        except Exception as error:  # every store has its own
            what = f"{type(error).__name__}: {error}"
            raise BadSampleError("shard_unreadable", what) from None

    def close(self) -> None:
        """Does nothing: fsspec owns the connections and reuses them for the next shard."""


def find_remote(url: str, timeout_s: float = 30.0) -> list[str]:
    """Returns the sorted shards of a url with `*` or of a folder `…/`. Other urls are one shard.

    Raises:
        ValueError: the scheme is unknown, its package is missing, nothing matches, or the store
            does not answer.
    """
    check_url(url)
    if url.startswith(("pipe:", "http://", "https://")):
        return [url]
    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        advice = "with pip, or give a command that writes the shard: 'pipe:…'"
        raise ValueError(f"shards {url!r}: {error} {advice}") from None
    except ValueError as error:
        raise ValueError(f"shards {url!r}: {error}") from None
    if not (url.endswith("/") or "*" in url):
        return [url]
    pattern = path.rstrip("/") + "/*.tar" if url.endswith("/") else path
    try:
        found = within(timeout_s, lambda: sorted(fs.glob(pattern)))
    except Exception as error:  # every store has its own
        raise ValueError(f"shards {url!r}: {error}") from None
    if not found:
        raise ValueError(f"no file matches {url!r}")
    return [fs.unstrip_protocol(path) for path in found]


def open_source(url: str, timeout_s: float) -> Source:
    """Opens a shard. A local file is opened at once, all others at their first read.

    Raises:
        ValueError: the replayed run directory may not open this url.
    """
    check_url(url)
    if url.startswith("pipe:"):
        return PipeFile(url.removeprefix("pipe:"), timeout_s)
    if url.startswith(("http://", "https://")):
        return HttpFile(url, timeout_s)
    if is_remote(url):
        return FsspecFile(url, timeout_s)
    return LocalFile(url)


def check_url(url: str) -> None:
    """Checks that a replayed run directory may open this url.

    Raises:
        ValueError: a shell command that the user did not allow, or a scheme that may do more than
            fetch bytes.
    """
    if REPLAYED not in os.environ or not is_remote(url):
        return
    allowed = json.loads(os.environ[REPLAYED])
    if url.startswith("pipe:"):
        if url not in allowed and "pipe:" not in allowed:
            raise ValueError(f"the run asks for the command {url!r}: add 'trust=[pipe:]' to run it")
        return
    scheme = url.partition("://")[0]
    typed = {known.partition("://")[0].removesuffix(":") for known in allowed}
    if scheme not in _STORES | typed:
        raise ValueError(f"the run asks for {url!r}: add 'trust=[\"{scheme}:\"]' to open it")


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url
