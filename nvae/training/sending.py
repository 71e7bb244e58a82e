"""A checkpoint that the first rank has read, sent to all others.

They neither read the file nor verify it. Tensors travel as bytes, the small ones together; beside
the result no rank holds more than one large tensor or one parcel.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvae.training.ranks import collective_device, has_others, on_first_rank

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
