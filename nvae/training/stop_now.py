"""Ctrl-C that stops at once: before the first step, or pressed for the second time.

The main thread answers. Where it cannot, because it waits for another rank outside Python, a thread
beside it ends the process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType, TracebackType

import pytorch_lightning as pl

ONE_PRESS = 1.0
"""Seconds within which a further Ctrl-C is the same one: a terminal together with a launcher
delivers one press twice."""

_GRACE = 5.0
"""Seconds that the main thread has for its answer."""


class StopNow(BaseException):
    """Ctrl-C where nothing is to be saved.

    Not KeyboardInterrupt: Lightning makes a crash of that.
    """


class StopsNow:
    """In the block Ctrl-C raises :class:`StopNow`, until a callback has a handler of its own.

    From then on a second press ends the block, which the callback sees to. Ranks that this
    process started end with it: they may be waiting for it. Where SIGINT is ignored, as in a
    shell's background job, it stays so.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._over = threading.Event()
        self._ranks: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.SIG_IGN:
            return
        signal.signal(signal.SIGINT, self._stop)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is signal.SIG_IGN:
            return
        if isinstance(error, StopNow):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._take_ranks()
            self._kill_ranks()
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise StopNow

    def _watch(self) -> None:
        first: float | None = None
        while number := os.read(self._read, 1)[0]:
            if number != signal.SIGINT:
                continue
            if signal.getsignal(signal.SIGINT) != self._stop:  # in training
                first = first or time.monotonic()
                if time.monotonic() - first <= ONE_PRESS:
                    continue
            self._take_ranks()
            if not self._over.wait(_GRACE):
                self._kill_ranks()
                if self._trainer.is_global_zero:
                    print("interrupted; run the same command again", file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)

    def _take_ranks(self) -> None:
        """From Lightning, which watches them and would call their end a crash."""
        started = getattr(self._trainer.strategy.launcher, "procs", [])
        self._ranks += started
        started.clear()

    def _kill_ranks(self) -> None:
        for process in self._ranks:
            process.kill()
