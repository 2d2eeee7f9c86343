"""Several ranks on this machine, forked from the test, so that nothing is imported again."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities import rank_zero_only

#: Seconds after which ranks that wait for one another are ended.
HANG = 240


def run_ranks(world: int, function: Callable[[int], Any]) -> list[Any]:
    """`function(rank)` in `world` processes that torchrun might have started; what each returns.

    Raises:
        RuntimeError: the tracebacks of ranks that failed, or that some never came back.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, function, pipes[rank][1]))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        results = [_receive(process, pipe[0]) for process, pipe in zip(ranks, pipes, strict=True)]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failures = [text for failed, text in results if failed]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in results]


def _receive(process: Any, pipe: Connection) -> tuple[bool, Any]:
    if not pipe.poll(HANG):
        return True, f"{process.name} hangs"
    try:
        return pipe.recv()
    except EOFError:
        return True, f"{process.name} died"


def _rank(rank: int, world: int, port: int, function: Callable, pipe: Connection) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world)),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        "GROUP_RANK": "0",
    }
    rank_zero_only.rank = fabric_rank_zero_only.rank = rank
    torch.set_num_threads(1)
    try:
        outcome = (False, function(rank))
    except BaseException:
        outcome = (True, f"rank {rank}: {traceback.format_exc()}")
    pipe.send(outcome)
    pipe.close()
    os._exit(0)  # what the test runner registered for its own end is not this process's


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
