"""A process that is forked while FFmpeg has threads."""

import gc
import os
import signal
import time

import av
import pytest

import datamodules.visuals.container  # noqa: F401 - what is tested is registered there

PATIENCE_S = 20


def leave_a_scaler_in_a_cycle() -> None:
    """Makes garbage that only the collector frees: a frame with a scaler, whose threads wait."""
    frame = av.VideoFrame(640, 480, "yuv420p")
    frame.reformat(320, 240, "rgb24", threads=2)
    held = [frame]
    held.append(held)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_does_not_wait_for_threads_that_it_has_not():
    gc.collect()
    gc.disable()
    try:
        leave_a_scaler_in_a_cycle()
        pid = os.fork()
        if pid == 0:
            try:
                gc.collect()
            finally:
                os._exit(0)
    finally:
        gc.enable()
    deadline = time.monotonic() + PATIENCE_S
    while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended, "the forked process hangs while it frees the scaler"
