"""A logger that fails is a warning, not the run's end."""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.loggers import Logger

from nvae.command_line import brief

_GUARDED = (
    "log_metrics", "log_hyperparams", "log_graph", "log_image", "after_save_checkpoint", "save",
    "finalize",
)  # fmt: skip
"""What the Trainer and this package ask of a logger while a run goes on."""

_LONGEST = 200


class Warnings:
    """Turns errors into lines on stderr, each cause once for each that failed."""

    def __init__(self) -> None:
        self._said = set[tuple[str, str]]()

    @contextmanager
    def instead(self, name: str, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is said and forgotten.

        Args:
            name: of the logger, or of whatever else works here.
            what: it was about to do.
        """
        try:
            yield
        except Exception as error:
            # Lightning's TensorBoard calls every error one of the value's type
            cause = error if isinstance(error, OSError) else error.__cause__ or error
            reason = brief(f"{type(cause).__name__}: {cause}", _LONGEST)
            kind = name, re.sub(r"\d+", "", reason)  # steps and values differ
            if kind not in self._said:
                self._said.add(kind)
                print(
                    f"{name} failed in {what} ({reason}); training goes on, and what it could not "
                    "take is missing from it",
                    file=sys.stderr,
                )


def guard(logger: Logger, name: str) -> Logger:
    """The same logger, whose calls no longer raise.

    Args:
        logger: Lightning's, ours or anybody's.
        name: of it, for the warnings.
    """
    warnings = Warnings()
    for method in _GUARDED:
        if hasattr(type(logger), method):
            setattr(logger, method, _guarded(getattr(logger, method), warnings, name))
    return logger


def _guarded(call: Callable[..., Any], warnings: Warnings, name: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def guarded(*arguments: Any, **more: Any) -> Any:
        with warnings.instead(name, call.__name__):
            return call(*arguments, **more)

    return guarded
