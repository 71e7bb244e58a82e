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
_Key = tuple[torch.device, int, int]


class Snapshot:
    """What a checkpoint held at one moment.

    Attributes:
        content: as it was given, tensors on the host; of those that :meth:`Snapshots.take` was told
            are constant only once :meth:`finish` has returned.
    """

    def __init__(self, content: Any, rest: tuple[list[Tensor], list[Tensor]]) -> None:
        self.content = content
        self._to, self._from = rest
        device = next((source.device for source in self._from if source.is_cuda), None)
        self._stream = None if device is None else torch.cuda.Stream(device)
        if self._stream is not None:  # after the kernels that have been asked for until now
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def finish(self) -> None:
        """Copy what is constant, from any thread; its memory may change afterwards."""
        with torch.cuda.stream(self._stream):  # beside the next step's kernels
            _copy(self._to, self._from)
        self._to, self._from = [], []


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
        self._used: dict[tuple[int, bool], int] = {}
        self._taken: dict[_Key, Tensor] = {}
        self._waiting = {_key(tensor.untyped_storage()) for tensor in constant}
        self._now: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._later: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied = self._copied(content)
        _copy(*self._now)
        return Snapshot(copied, self._later)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            storage = self._host(value.untyped_storage())
            like = torch.empty(0, dtype=value.dtype)
            return like.set_(storage, value.storage_offset(), value.size(), value.stride())
        if isinstance(value, dict):
            same = copy.copy(value)  # with attributes, such as a state_dict's _metadata
            for key, entry in value.items():
                same[key] = self._copied(entry)
            return same
        if type(value) in (list, tuple):
            return type(value)(self._copied(entry) for entry in value)
        if isinstance(value, str | int | float | None):
            return value
        return copy.deepcopy(value)

    def _host(self, storage: UntypedStorage) -> UntypedStorage:
        key = _key(storage)
        if key not in self._taken:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._taken[key] = self._buffer(storage.nbytes(), source.is_cuda)
            to, sources = self._later if key in self._waiting else self._now
            to.append(self._taken[key])
            sources.append(source)
        return self._taken[key].untyped_storage()

    def _buffer(self, size: int, pinned: bool) -> Tensor:
        buffers = self._buffers.setdefault((size, pinned), [])
        used = self._used.get((size, pinned), 0)
        self._used[size, pinned] = used + 1
        if used == len(buffers):
            buffers.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
        return buffers[used]


def _key(storage: UntypedStorage) -> _Key:
    return storage.device, storage.data_ptr(), storage.nbytes()


def _copy(to: list[Tensor], sources: list[Tensor]) -> None:
    """Return when all bytes are there."""
    for on_cuda in (False, True):
        pairs = [(t, s) for t, s in zip(to, sources, strict=True) if s.is_cuda == on_cuda]
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs], non_blocking=on_cuda)
            if on_cuda:
                torch.cuda.current_stream().synchronize()


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
