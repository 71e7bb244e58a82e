"""A checkpoint's content, copied to host memory, and the thread that writes it.

Fresh memory costs several times the copy, in page faults or in page-locking. So the memory is used
again and again: a second copy overwrites the first, which has to be on disk by then, and one
checkpoint is in flight at a time. `torch.distributed.checkpoint.async_save` does the like, but
writes a folder of shards, which is no file that `load_model` reads, and believes that what it wrote
is what a reader will find.
"""

import copy
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
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
        # a thread begins with the first GPU as its own, and would take memory there to come back
        own = nullcontext() if self._stream is None else torch.cuda.device(self._stream.device)
        with own, torch.cuda.stream(self._stream):  # beside the next step's kernels
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


class BackgroundWriter:
    """Does one work after another in its thread; after an error nothing more, until it was raised.

    The thread is waited for at the process's end.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="nvae-checkpoint")
        self._snapshots = Snapshots()
        self._pending: list[Future[None]] = []
        self._error: BaseException | None = None
        self._copied = threading.Event()
        self._copied.set()

    @property
    def has_failed(self) -> bool:
        """Whether :meth:`wait` would raise; does not wait."""
        return self._error is not None

    def save(
        self, content: Any, write: Callable[[Any], None], constant: Iterable[Tensor] = ()
    ) -> None:
        """Copy ``content`` and hand the copy to ``write``, in the thread.

        Waits for what is being written: there is one copy in memory, and of two checkpoints the
        older one may be the only good one.

        Args:
            content: of a checkpoint.
            write: gets it on the host.
            constant: tensors that do not change before :meth:`settle` has returned.

        Raises:
            Exception: of what was written before.
        """
        self.wait()
        snapshot = self._snapshots.take(content, constant)
        self._copied.clear()
        self.submit(lambda: self._finish(snapshot, write))

    def _finish(self, snapshot: Snapshot, write: Callable[[Any], None]) -> None:
        try:
            content = snapshot.finish()
        finally:
            self._copied.set()
        write(content)

    def submit(self, work: Callable[[], None]) -> None:
        """Do something after what is being written, unless that fails."""
        self._pending.append(self._executor.submit(self._do, work))

    def _do(self, work: Callable[[], None]) -> None:
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def settle(self) -> None:
        """Wait until what is being written is copied: from then on its tensors may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait until everything is done.

        Raises:
            Exception: of what failed first.
        """
        for future in self._pending:
            future.result()
        self._pending = []
        error, self._error = self._error, None
        if error is not None:
            raise error
