"""Timeouts and retries of reads: no read hangs, even if a server or store does."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar, cast

from datamodules.errors import BadSampleError

SLOWEST = 64 * 1024  # bytes per second; a slower source counts as stalled
_TRIES = 3

T = TypeVar("T")


class Patience:
    """A timeout of `timeout_s` seconds that grows with the bytes received."""

    def __init__(self, timeout_s: float):
        self._timeout_s, self._lag_s = timeout_s, 0.0

    def add(self, waited_s: float, received: int) -> None:
        self._lag_s = max(0.0, self._lag_s + waited_s - received / SLOWEST)
        if self._lag_s > self._timeout_s:
            raise self.lost()

    def lost(self) -> BadSampleError:
        return BadSampleError("shard_stalled", f"hardly anything came for {self._timeout_s:g} s")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Runs `call` with a timeout and returns or raises what it does.

    Raises:
        BadSampleError: shard_stalled; the call continues in its thread.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # handed over to the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise BadSampleError("shard_stalled", f"no answer for {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, value)


def persistently(read: Callable[[], bytes]) -> bytes:
    """Calls `read`, with up to three attempts if the error may be temporary."""
    for attempt in range(_TRIES):
        try:
            return read()
        except BadSampleError as error:
            passing = error.reason in ("shard_unreadable", "shard_cut", "shard_stalled")
            if not passing or attempt == _TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("not reached")
