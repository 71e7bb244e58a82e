"""Launches over many tensors at once: the tables that find them, and when two tensors lie alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

MOST_IN_TABLES = 2**20
"""Numbers in all tables of a capture, 8 MiB: enough for some 10^9 weights."""


class CapturedTables:
    """The tables of one capture, which copies nothing to the device: they are filled afterwards.

    Their memory is made before the capture. What is made inside may lie where an earlier tensor of
    the graph has been, and that one's kernel would overwrite the table at every replay.

    Attributes:
        memory: of all tables. The graph reads it at every replay: its owner keeps it for as long.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(MOST_IN_TABLES, dtype=torch.int64, device=device)
        self._contents: list[Tensor] = []
        self._used = 0

    def place(self, table: Tensor) -> Tensor:
        """Where a table on the host will be on the device.

        Raises:
            RuntimeError: there is no room for it.
        """
        begin, self._used = self._used, self._used + table.numel()
        if self._used > MOST_IN_TABLES:
            raise RuntimeError("the tables of a captured step have no room for so many tensors")
        self._contents.append(table.flatten())
        return self.memory[begin : self._used].view(table.shape)

    def fill(self) -> None:
        """Copy them to the device; the host waits."""
        if self._contents:
            self.memory[: self._used].copy_(torch.cat(self._contents))


_capturing: list[CapturedTables] = []
"""Of the capture at hand. No context variable: autograd asks for tables in a thread of its own."""


@contextmanager
def tables_of_capture(device: torch.device) -> Iterator[CapturedTables]:
    """Around a capture: what is launched inside gets its tables, which are filled at the end.

    Args:
        device: that is captured on.
    """
    tables = CapturedTables(device)
    _capturing[:] = [tables]
    try:
        yield tables
    finally:
        _capturing.clear()
    tables.fill()


def block_table(
    device: torch.device, rows: tuple[tuple[int, ...], ...], counts: tuple[int, ...], per_block: int
) -> tuple[Tensor, Tensor]:
    """What a launch over many tensors reads to find them, copied to the device once.

    Args:
        device: where to.
        rows: of every tensor what the kernel wants to know: addresses, sizes.
        counts: items of every tensor.
        per_block: items of a block.

    Returns:
        The rows as int64, and for every block its tensor and its first item, ``(blocks, 2)`` int64.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return _copied_table(device, rows, counts, per_block)
    if not _capturing:
        raise RuntimeError("this capture has no tables_of_capture around it")
    # addresses are those of the graph's own memory, so no earlier table will do
    rows_on_host, blocks = _table(rows, counts, per_block)
    return _capturing[0].place(rows_on_host), _capturing[0].place(blocks)


def _table(
    rows: tuple[tuple[int, ...], ...], counts: tuple[int, ...], per_block: int
) -> tuple[Tensor, Tensor]:
    blocks = [(t, first) for t, n in enumerate(counts) for first in range(0, n, per_block)]
    return torch.tensor(rows), torch.tensor(blocks)


# An allocator gives the same addresses again at every step, which takes some thirty
# tables for a deep network. Where one is not found the host waits.
@lru_cache(maxsize=128)
def _copied_table(
    device: torch.device, rows: tuple[tuple[int, ...], ...], counts: tuple[int, ...], per_block: int
) -> tuple[Tensor, Tensor]:
    table, blocks = _table(rows, counts, per_block)
    return table.to(device), blocks.to(device)


def is_laid_out_like(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order of elements.

    Strides over a dimension of one element mean nothing: a depthwise convolution's weight may have
    any over its only input channel, a 1x1 convolution's over its only pixel.
    """
    if a.stride() == b.stride():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


def laid_out_like(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` with the strides of ``like``, which is of its shape; a copy only where it moves.

    What compares strides itself takes others over a dimension of one element for another layout.
    """
    if tensor.stride() == like.stride():
        return tensor
    if is_laid_out_like(tensor, like):
        return tensor.as_strided(like.size(), like.stride())
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
