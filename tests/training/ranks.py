"""Run a function in several processes that share a gloo group on this machine."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests import PATIENCE


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _worker(
    function: Callable[..., Any], rank: int, world: int, port: int, queue: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        if world > 1:
            dist.init_process_group(
                "gloo", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
            )
        queue.put((rank, function(rank, world, *arguments), None))
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """``function(rank, world, *arguments)`` in ``world`` processes; results by rank.

    Results travel as plain types or numpy arrays.
    """
    # one server imports the test's module, and forks before any thread or gradient exists
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    queue, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_worker, args=(function, rank, world, port, queue, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, error = queue.get(timeout=PATIENCE)
            if error is not None:
                raise AssertionError(f"rank {rank}: {error}")
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
