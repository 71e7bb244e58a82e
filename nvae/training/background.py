"""Writes checkpoints in a thread of its own, one at a time, while training goes on.

`torch.distributed.checkpoint.async_save` does the like, but writes a folder of shards, which is no
file that `load_model` reads, and believes that what it wrote is what a reader will find.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from nvae.training.snapshot import Snapshot, Snapshots


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
                self._copied.set()

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
