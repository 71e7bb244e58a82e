"""What one rank does or meets, and all of them have to know.

Ranks that wait for one another must take the same way: an error that one of them alone meets would
leave the others waiting until the process group's timeout. Functions here are common acts: all
ranks call them, in the same order. With one process they cost nothing.

A checkpoint is read and verified by the first rank and sent to all others. Tensors travel as bytes,
the small ones together; beside the result no rank holds more than one large tensor or one parcel.

Data parallel training never compares what ranks begin with. One that began with other running
statistics or spectral vectors would stay different, and what is saved would be one rank's alone; so
that is checked once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

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


def is_first_rank() -> bool:
    """Whether this process speaks for all that can talk to one another; true of one alone."""
    return not has_others() or dist.get_rank() == 0


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


PARCEL = 64 * 2**20
"""Bytes from which a parcel of tensors is sent."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs, and what it is like."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


def from_first_rank(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``read`` gives on the first rank, on all of them, on the CPU; all have to call this.

    Args:
        read: gives plain types and dense tensors on the CPU.

    Raises:
        Exception: what it raises, on the first rank.
        OtherRankError: on the others.
    """
    if not has_others():
        return read()
    tensors: list[Tensor] = []

    def skeleton() -> Any:
        return _mapped(read(), Tensor, lambda tensor: _taken(tensor, tensors))

    outline = on_first_rank(skeleton)
    places: list[_Place] = []
    _mapped(outline, _Place, places.append)
    received = iter(_send(tensors) if dist.get_rank() == 0 else _receive(places))
    result: dict[str, Any] = _mapped(outline, _Place, lambda _: next(received))
    return result


def _mapped(content: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of nested dictionaries, lists and tuples with every entry of a kind changed."""
    if isinstance(content, kind):
        return change(content)
    if isinstance(content, dict):
        return type(content)((key, _mapped(value, kind, change)) for key, value in content.items())
    if type(content) in (list, tuple):
        return type(content)(_mapped(value, kind, change) for value in content)
    return content


def _taken(tensor: Tensor, tensors: list[Tensor]) -> _Place:
    tensors.append(tensor)
    return _Place(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _parcels(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of tensors that are sent together."""
    begin = total = 0
    for end, size in enumerate(sizes, 1):
        total += size
        if total >= PARCEL or end == len(sizes):
            yield begin, end
            begin, total = end, 0


def _send(tensors: list[Tensor]) -> list[Tensor]:
    for begin, end in _parcels([t.nbytes for t in tensors]):
        parts = [t.contiguous().reshape(-1).view(torch.uint8) for t in tensors[begin:end]]
        _broadcast(parts[0] if len(parts) == 1 else torch.cat(parts))
    return tensors


def _receive(places: list[_Place]) -> Iterator[Tensor]:
    for begin, end in _parcels([place.nbytes for place in places]):
        sizes = [place.nbytes for place in places[begin:end]]
        parcel = torch.empty(sum(sizes), dtype=torch.uint8)
        parcel = _broadcast(parcel)
        for place, part in zip(places[begin:end], parcel.split(sizes), strict=True):
            # a copy: the parcel goes when its last tensor has been taken out
            tensor = torch.empty_strided(place.size, place.stride, dtype=place.dtype)
            yield tensor.copy_(part.clone().view(place.dtype).reshape(place.size))


def _broadcast(parcel: Tensor) -> Tensor:
    """Send it, or fill it; through the device where the process group needs that, in pieces."""
    device = collective_device()
    for piece in parcel.split(PARCEL):
        sent = piece.to(device)
        dist.broadcast(sent, 0)
        if dist.get_rank() and sent is not piece:
            piece.copy_(sent)
    return parcel


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**22
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""A factor that spreads places over 64 bits."""


class EqualRanks(pl.Callback):
    """Compares the ranks' weights and buffers when training begins, at first and after a resume."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is compared where a strategy gives each rank a part of the weights.

        Raises:
            RuntimeError: on all ranks; it names the first tensor that differs.
        """
        if isinstance(trainer.strategy, DDPStrategy):
            check_equal((*pl_module.named_parameters(), *pl_module.named_buffers()))


def check_equal(named: Iterable[tuple[str, Tensor]]) -> None:
    """A common act: every rank names the same tensors in the same order.

    Raises:
        RuntimeError: on all ranks; it names the first tensor that differs, bit for bit.
    """
    if not has_others():
        return
    names, tensors = zip(*named, strict=True)
    with torch.no_grad():
        digests = torch.stack([digest(tensor) for tensor in tensors]).to(collective_device())
    both = torch.cat([digests, ~digests])  # the second half's least is the first half's greatest
    dist.all_reduce(both, dist.ReduceOp.MIN)
    least, greatest = both.split(len(names))
    different = (least != ~greatest).nonzero()
    if len(different):
        first = int(different[0])
        raise RuntimeError(
            f"{names[first]} {tuple(tensors[first].shape)} is not the same on all ranks, and so "
            f"are {len(different)} of {len(names)} weights and buffers; they have to begin alike"
        )


def digest(tensor: Tensor) -> Tensor:
    """A number of 64 bits, 0-d, on the tensor's device; a change of one bit changes it."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGER[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, piece in enumerate(bits.split(_PIECE)):
        place = torch.arange(len(piece), device=tensor.device) + number * _PIECE
        total += ((2 * place + 1) * _ODD * (piece.long() + 1)).sum()  # odd, and modulo 2**64
    return total
