"""What one rank does or meets, and all of them have to know.

Ranks that wait for one another must take the same way: an error that one of them alone meets would
leave the others waiting until the process group's timeout. Each function here is a common act: all
ranks call it, in the same order. With one process it costs nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nvae.command_line import brief

T = TypeVar("T")


class OtherRankError(Exception):
    """Another rank has failed, and this one ends with it; the message is the other's, one line.

    Attributes:
        rank: the one that failed.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def has_others() -> bool:
    """Whether this process is one of several that can talk to one another by now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def collective_device() -> torch.device:
    """Where tensors must be for the process group to send them."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def any_rank(flag: bool) -> bool:
    """Whether it is true on at least one rank."""
    if not has_others():
        return flag
    found = torch.tensor(int(flag), device=collective_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def raise_everywhere(error: Exception | None) -> None:
    """If any rank has met an error, let all of them raise one; waits for the slowest rank.

    Args:
        error: that this rank has met, or None.

    Raises:
        Exception: ``error`` itself, on the first rank that has one: it is told once.
        OtherRankError: on the others.
    """
    if has_others():
        world, rank = dist.get_world_size(), dist.get_rank()
        flag = torch.tensor(0 if error is None else world - rank, device=collective_device())
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if failed := int(flag):
            message: list[Any] = [None if error is None else _described(error)]
            dist.broadcast_object_list(message, world - failed)
            if rank != world - failed:
                raise OtherRankError(world - failed, message[0]) from error
    if error is not None:
        raise error


@contextmanager
def together() -> Iterator[None]:
    """A block that all ranks run: what goes wrong in it on one is raised on all, at its end.

    In the block ranks must not wait for one another after a point where one alone may fail.
    What is no ``Exception``, such as Ctrl-C, leaves it at once.

    Raises:
        Exception: what the block has raised, on the first rank where it has.
        OtherRankError: on the others.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_everywhere(error)


def on_first_rank(action: Callable[[], T]) -> T:
    """What ``action``, which the first rank alone carries out, returns there.

    Args:
        action: talks to no other rank; its result can be pickled.

    Raises:
        Exception: what the action has raised, on the first rank.
        OtherRankError: on the others.
    """
    if not has_others():
        return action()
    error, answer = None, [None, None]  # type: tuple[Exception | None, list[Any]]
    if dist.get_rank() == 0:
        try:
            answer = [action(), None]
        except Exception as raised:
            error, answer = raised, [None, _described(raised)]
    dist.broadcast_object_list(answer)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise OtherRankError(0, answer[1])
    result: T = answer[0]
    return result


def _described(error: Exception) -> str:
    return brief(error) or type(error).__name__
