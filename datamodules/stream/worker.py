"""What a process that reads and decodes does with signals that are meant for the training."""

import os
import signal
from types import FrameType


def outlive_stop_signals(worker_id: int) -> None:
    """A DataLoader's `worker_init_fn`: only the training decides when its workers end.

    Schedulers and terminals signal every process of a job. A worker that dies of it takes the
    training with it, before that has saved. The first SIGTERM is taken for such a one; by a second
    one, or where the training is gone, the worker ends.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, first)
