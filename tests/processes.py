"""Processes of their own: several that train together, and one that is killed in the middle.

They are forked from a server that has imported what they need, since an import takes seconds.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context

import torch
from torch.distributed import TCPStore

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.runs", "torch.distributed.fsdp", "torch._dynamo"])
KILLED = signal.SIGKILL


def run(work, *arguments, environment=None) -> int:
    """The exit status of a process that calls `work`; minus the signal that killed it."""
    return together(work, [(arguments, environment or {})])[0]


def together(work, calls) -> list[int]:
    """The exit statuses of processes that run side by side; where one fails, the others end."""
    processes = [CONTEXT.Process(target=_work, args=(work, *call)) for call in calls]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for ended in connection.wait(running):
            process = running.pop(ended)
            process.join()
            if process.exitcode:
                for other in running.values():
                    other.kill()
    return [process.exitcode for process in processes]


def as_torchrun(work, n: int, *arguments) -> list[int]:
    """The exit statuses of `n` processes with the environment that `torchrun` gives."""
    # Theirs is the store of the parent, whose port is its own from the start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    return together(work, [(arguments, shared | rank) for rank in ranks])


def _work(work, arguments, environment) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    work(*arguments)


def kill_after(events: int) -> None:
    """Kill this process, as `kill -9` does, once it has made so many calls and returns."""
    left = itertools.count(events, -1)
    sys.setprofile(lambda *_: next(left) or os.kill(os.getpid(), KILLED))


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """How many calls and returns happen meanwhile."""
    number = itertools.count()
    sys.setprofile(lambda *_: next(number) and None)
    try:
        yield lambda: next(number)
    finally:
        sys.setprofile(None)
