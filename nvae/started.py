"""Processes that Lightning starts beside the first end with it, however it ends.

Lightning's first process watches those that it has started, but nobody watches the first: killed,
or interrupted while it starts the next, it leaves processes behind that wait for it for ever. It
imports nothing heavy, so that the watch begins with the command.
"""

import os
import threading
import time

FIRST_PROCESS = "NVAE_FIRST_PROCESS"
"""Environment variable that holds the first process's number for those it is about to start."""

LOOK_EVERY = 0.5
"""Seconds between two looks at the process that started this one."""


def will_start_others() -> None:
    """Say, in the first process of this machine, that those it starts are to end with it."""
    os.environ[FIRST_PROCESS] = str(os.getpid())


def end_with_first_process() -> None:
    """Where another process of the command started this one, end within a second of its end.

    A process that torchrun or SLURM started is their own to end, and what it inherited from one
    that has trained before says nothing about it. Processes that this one starts inherit nothing.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if local_rank == "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    first = os.environ.pop(FIRST_PROCESS, None)
    if first is not None:
        threading.Thread(target=_watch, args=(int(first),), daemon=True).start()


def _watch(first: int) -> None:
    while os.getppid() == first:  # the kernel gives an orphan another parent at once
        time.sleep(LOOK_EVERY)
    os._exit(1)  # the main thread may be waiting, outside Python, for the one that is gone
