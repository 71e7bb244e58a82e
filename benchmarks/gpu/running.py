"""Parts of the acceptance, and the processes that their cases run in.

Every case has a process of its own: a crash, a hang or a broken CUDA context ends that case alone,
peak memory is that case's, and nothing that one has compiled or cached in Python helps the next.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from nvae.command_line import brief

Cases = Mapping[str, Mapping[str, Any]]
"""What was measured, by case: what `benchmarks/results` keeps of a part."""

DRY = "dry"
"""Stands for a GPU's name in a dry run."""

SECONDS_TO_END = 10.0
"""After its last word a process may flush and free; then it is killed."""


class Emit(Protocol):
    """How a case hands out a result while it runs."""

    def __call__(self, line: str, **values: Any) -> None:
        """Print a line and keep values, plain types, under their names."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: unique in its part.
        work: a function of a module, called with an :class:`Emit` and the arguments.
        arguments: of `work`, by name; they are pickled.
        seconds: after which it is stopped.
    """

    name: str
    work: Callable[..., None]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 240.0


@dataclass(frozen=True)
class Setting:
    """What the command line says to a part.

    Attributes:
        dry: tiny shapes on the CPU, to try the command without a GPU.
        data_root: folder of Fashion-MNIST's IDX files.
        folder: for what a case leaves beside its numbers.
        seconds: that the part may take.
    """

    dry: bool
    data_root: str | None
    folder: Path
    seconds: float


@dataclass(frozen=True)
class Bar:
    """What a figure must reach.

    Attributes:
        what: is measured.
        wanted: bound of the figure.
        unit: behind the figure, such as ``x``, ``%`` or ``ms``.
        measured: the figure of the part's cases; None: it is not there.
        at_most: the bound is the largest value allowed, not the smallest.
        device: part of the name of the GPU that the bound is for; None: any.
    """

    what: str
    wanted: float
    unit: str
    measured: Callable[[Cases], float | None]
    at_most: bool = False
    device: str | None = None

    def verdict(self, cases: Cases, device: str) -> str:
        """``met``, ``not met``, ``not measured``, or ``not judged`` on this GPU."""
        value = self.measured(cases)
        if value is None:
            return "not measured"
        if device == DRY or (self.device is not None and self.device not in device):
            return "not judged"
        return (
            "met" if (value <= self.wanted if self.at_most else value >= self.wanted) else "not met"
        )


@dataclass(frozen=True)
class Part:
    """Some cases that are run together.

    Attributes:
        name: on the command line.
        cases: in the order of their worth; those that the time does not reach are left out.
        figures: the rows of the part's table: what, figure, beside what.
        bars: its bars.
        seconds: that it may take.
    """

    name: str
    cases: Callable[[Setting], list[Case]]
    figures: Callable[[Cases], Iterable[tuple[str, str, str]]]
    bars: tuple[Bar, ...] = ()
    seconds: float = 530.0


def run_case(
    case: Case, seconds: float, log: Path, take: Callable[[str, dict[str, Any]], None]
) -> str | None:
    """Run a case in a process of its own, and end all that it has started.

    Args:
        case: to run.
        seconds: that it may take.
        log: what its process prints is added to this file.
        take: is given each line and its values as they come.

    Returns:
        Why it failed; None: it did not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.gpu.__main__"])
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, case.work, dict(case.arguments), str(log)))
    process.start()
    there.close()
    until = time.monotonic() + seconds
    try:
        while (left := until - time.monotonic()) > 0 and here.poll(left):
            try:
                kind, *content = here.recv()
            except (EOFError, ConnectionError):
                process.join(SECONDS_TO_END)
                return f"its process ended with {_ending(process)}"
            if kind == "done":
                process.join(SECONDS_TO_END)
                return None
            if kind == "failed":
                reason, trace = content
                take("", {"traceback": trace})
                return str(reason)
            take(*content)
        return f"stopped after {seconds:.0f} s"
    finally:
        here.close()
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # compilers and training runs, too
        process.kill()
        process.join(SECONDS_TO_END)


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"code {code}"
    return signal.Signals(-code).name


def _work(pipe: Connection, work: Callable[..., None], arguments: Any, log: str) -> None:
    os.setsid()  # a group to be killed, that Ctrl-C does not reach
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())

    def emit(line: str, **values: Any) -> None:
        pipe.send(("row", line, values))

    try:
        work(emit, **arguments)
        pipe.send(("done",))
    except BaseException as error:
        trace = traceback.format_exc()
        print(trace, file=sys.stderr)
        pipe.send(("failed", brief(f"{type(error).__name__}: {error}"), trace))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # nothing is left to be tidied up, and a broken context cannot hang it


def _end_with(pipe: Connection) -> None:
    """End this process and all of its group when the command is gone, killed or not."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.killpg(0, signal.SIGKILL)
