"""A checkpoint's content, copied to host memory that is used again and again.

Fresh memory costs several times the copy, in page faults or in page-locking. So a second copy
overwrites the first, which has to be on disk by then.
"""

import copy
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, UntypedStorage

from nvae.training.ema import MovingAverage

_KNOWN = ("nvae", "pytorch_lightning")


class Snapshot:
    """What a checkpoint held at one moment, tensors on the host."""

    def __init__(self, content: Any, work: "_Work") -> None:
        self._content, self._work = content, work
        # after the kernels that have been asked for until now
        device = work.device
        self._stream = None if device is None else torch.cuda.Stream(device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def finish(self) -> Any:
        """Copy what was said to be constant, from any thread; its memory may change afterwards."""
        with torch.cuda.stream(self._stream):  # beside the next step's kernels
            content = self._work.copied(self._content, only_constant=True)
            self._work.carry_out()
        return content


class Snapshots:
    """Takes one copy after another into the same buffers, page-locked where a source is on CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, bool], list[Tensor]] = {}

    def take(self, content: Any, constant: Iterable[Tensor] = ()) -> Snapshot:
        """Copy plain types, containers and tensors; storages that are shared stay so.

        Args:
            content: of a checkpoint.
            constant: tensors that nobody changes before :meth:`Snapshot.finish` has returned; their
                copy is left to it.
        """
        work = _Work(self._buffers, constant)
        copied = work.copied(content)
        work.carry_out()
        return Snapshot(copied, work)


class _Work:
    """One copy, in two parts: at once, and of what is constant."""

    def __init__(
        self, buffers: dict[tuple[int, bool], list[Tensor]], constant: Iterable[Tensor]
    ) -> None:
        self._buffers, self._used = buffers, dict[tuple[int, bool], int]()
        constant = list(constant)
        self._constant = {tensor.untyped_storage().data_ptr() for tensor in constant}
        self.device = next((t.device for t in constant if t.is_cuda), None)
        self._taken: dict[tuple[int, int], UntypedStorage] = {}
        self._to: list[Tensor] = []
        self._from: list[Tensor] = []

    def copied(self, value: Any, only_constant: bool = False) -> Any:
        """The same with tensors on the host, whose bytes come with :meth:`carry_out`.

        Args:
            value: of a checkpoint.
            only_constant: what was left in place the first time; False: all else.
        """
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            storage = value.untyped_storage()
            if (storage.data_ptr() in self._constant) != only_constant:
                return value
            host = torch.empty(0, dtype=value.dtype)
            host.set_(self._host(storage), value.storage_offset(), value.size(), value.stride())
            return host
        if isinstance(value, dict):
            same = value if only_constant else copy.copy(value)  # and attributes: _metadata
            for key, entry in value.items():
                same[key] = self.copied(entry, only_constant)
            return same
        if type(value) in (list, tuple):
            return type(value)(self.copied(entry, only_constant) for entry in value)
        if only_constant or isinstance(value, str | int | float | None):
            return value
        return copy.deepcopy(value)

    def _host(self, storage: UntypedStorage) -> UntypedStorage:
        key = storage.data_ptr(), storage.nbytes()
        if key not in self._taken:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            to = self._buffer(storage.nbytes(), source.is_cuda)
            self._taken[key] = to.untyped_storage()
            self._to.append(to)
            self._from.append(source)
        return self._taken[key]

    def _buffer(self, size: int, pinned: bool) -> Tensor:
        buffers = self._buffers.setdefault((size, pinned), [])
        used = self._used.get((size, pinned), 0)
        self._used[size, pinned] = used + 1
        if used == len(buffers):
            buffers.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        return buffers[used]

    def carry_out(self) -> None:
        """Return when all bytes are there."""
        for on_cuda in (False, True):
            pairs = [
                (t, s) for t, s in zip(self._to, self._from, strict=True) if s.is_cuda == on_cuda
            ]
            if pairs:
                to, sources = zip(*pairs, strict=True)
                torch._foreach_copy_(list(to), list(sources), non_blocking=on_cuda)
        if any(source.is_cuda for source in self._from):
            torch.cuda.current_stream().synchronize()
        self._to, self._from = [], []


def averages(trainer: pl.Trainer) -> list[MovingAverage]:
    """Those that a run keeps, one at most in practice."""
    return [c for c in trainer.callbacks if isinstance(c, MovingAverage)]  # type: ignore[attr-defined]


def constant_until_next_step(trainer: pl.Trainer) -> list[Tensor]:
    """What no code of ours or Lightning's changes between two optimizer steps of an epoch.

    Weights, their averages and the optimizer's state, not the model's buffers. Nothing at all,
    where somebody else's callback or module might.
    """
    module = trainer.lightning_module
    parts = [module, *trainer.callbacks]  # type: ignore[attr-defined]
    if any(type(part).__module__.partition(".")[0] not in _KNOWN for part in parts):
        return []
    states = (s for o in trainer.optimizers for s in o.state.values())
    return [
        *module.parameters(),
        *(value for state in states for value in state.values() if isinstance(value, Tensor)),
        *(value for each in averages(trainer) for value in each.averaged_state().values()),
    ]
