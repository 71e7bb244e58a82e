"""One progress bar with the time left; a line now and then where the output is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 20.0
"""Seconds between two lines where the output is no terminal."""


@contextmanager
def progress_bar(
    description: str, total: int, *, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; the block gets a function that advances it.

    Args:
        description: what is being done.
        total: steps until done.
        shown: False for all processes but the first.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not shown:
        yield lambda _: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda steps: progress.advance(task, steps)
    else:
        yield _PlainProgress(console, description, total).advance


class _PlainProgress:
    def __init__(self, console: Console, description: str, total: int) -> None:
        self._console, self._description, self._total = console, description, total
        self._done = self._done_when_printed = 0
        self._printed = time.monotonic()

    def advance(self, steps: int) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._printed < PLAIN_SECONDS:
            return
        # the pace since the last line: what an earlier start had done came in no time
        seconds_a_step = (now - self._printed) / (self._done - self._done_when_printed)
        left = int(seconds_a_step * (self._total - self._done))
        self._printed, self._done_when_printed = now, self._done
        self._console.print(
            f"{self._description}  {self._done}/{self._total}  {left // 60}:{left % 60:02d} left"
        )
