"""Tensors of a device copied to the host in one piece, without waiting for it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 16 * 2**20
"""Elements that are gathered on the device for one copy: 64 MiB of float32."""


class HostCopy:
    """Copies of tensors in one block of pinned memory, made anew at every :meth:`start`.

    The block is filled by a few large copies: small tensors are first gathered on the device,
    :data:`CHUNK` elements at a time. All of it is queued on the current stream; the host goes on.

    Args:
        tensors: of one type and one device; of the same shapes at every copy.

    Attributes:
        copies: on the host, of the tensors' shapes and memory formats; valid after :meth:`wait`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        first = tensors[0]
        on_gpu = first.is_cuda
        block = torch.empty(
            sum(t.numel() for t in tensors), dtype=first.dtype, device="cpu", pin_memory=on_gpu
        )
        pieces = block.split([t.numel() for t in tensors])
        # empty_like keeps a memory format where it leaves no holes
        self._strides = [torch.empty_like(t, device="meta").stride() for t in tensors]
        self.copies = [
            piece.as_strided(t.shape, stride, piece.storage_offset())
            for t, stride, piece in zip(tensors, self._strides, pieces, strict=True)
        ]
        self._chunks = list(_chunks([t.numel() for t in tensors]))
        self._targets = block.split([size for _, _, size in self._chunks])
        largest = max((size for start, end, size in self._chunks if end - start > 1), default=0)
        self._staging = first.new_empty(largest)
        self._done = torch.cuda.Event(blocking=True) if on_gpu else None

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copies. What :meth:`wait` was not called for is overwritten."""
        rows = [_in_order(t, stride) for t, stride in zip(tensors, self._strides, strict=True)]
        for (start, end, size), target in zip(self._chunks, self._targets, strict=True):
            if end - start == 1:
                target.copy_(rows[start], non_blocking=True)
            else:
                staged = torch.cat(rows[start:end], out=self._staging[:size])
                target.copy_(staged, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Until the copies are whole; from any thread."""
        if self._done is not None:
            self._done.synchronize()


def _in_order(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor as one row, in the order of memory that ``stride`` gives it."""
    t = t.detach()
    if t.stride() != stride:
        t = torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided((t.numel(),), (1,))


def _chunks(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """First, last + 1 and elements of neighbors that fit a chunk; larger ones go alone."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > CHUNK:
            yield start, i, total
            start, total = i, 0
        total += size
    yield start, len(sizes), total
