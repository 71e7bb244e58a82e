"""What the benchmarks share: arguments, timing, peak memory."""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.common import keep_freed_memory
from nvae.cli.config import TrainConfig, compose_train
from nvae.cli.errors import one_line
from nvae.command_line import fail

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Median, fastest and slowest run, in ms, and the peak memory in MiB."""

    median: float
    fastest: float
    slowest: float
    peak_memory: float

    def row(self, what: str, images: int) -> str:
        """One line: ms, images/s."""
        return (
            f"{what:<28} {self.median:9.1f} ms  ({self.fastest:.1f} to {self.slowest:.1f})  "
            f"{1000 * images / self.median:9.1f} images/s"
        )


SWITCH = {"true": True, "false": False}.__getitem__

T = TypeVar("T")


def read_words(options: T, words: Sequence[str], parts: Sequence[str], kinds: dict[str, Any]) -> T:
    """Options as the words ``PART`` and ``KEY=VALUE`` of a command line say.

    Args:
        options: a dataclass with the defaults, and the parts named so far in ``parts``.
        words: of the command line.
        parts: names that a word without ``=`` may be.
        kinds: how the text of each setting is read.

    Raises:
        SystemExit: a word means nothing; the line is printed.
    """
    changes: dict[str, Any] = {"parts": ()}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign and word in parts:
            changes["parts"] += (word,)
        elif sign and key in kinds:
            try:
                changes[key] = kinds[key](value)
            except (ValueError, KeyError):
                raise fail(f"{key}={value!r} is no value of {key}") from None
        else:
            settings = ", ".join(f"{name}=" for name in kinds)
            raise fail(f"{word!r} is unknown; parts: {', '.join(parts)}; settings: {settings}")
    return replace(options, **changes)  # type: ignore[type-var]


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that both model benchmarks take."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "overrides", nargs="*", default=["experiment=mnist"],
        help="as for train.py; default: experiment=mnist",
    )  # fmt: skip
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--precision", choices=PRECISIONS, default="32")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--warmup", type=int, default=3)
    arguments.add_argument("--runs", type=int, default=10)
    return arguments


def composed(overrides: Sequence[str]) -> TrainConfig:
    """What train.py would run with these overrides; a mistake in them is one line and the end."""
    try:
        return compose_train(overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise fail(one_line(error, TrainConfig)) from None


def set_up(options: argparse.Namespace) -> None:
    """Apply thread count and allocator settings, as the commands do.

    Raises:
        SystemExit: no such device; the line is printed.
    """
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:
        raise fail(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True


def measure(call: Callable[[], object], device: str, warmup: int, runs: int) -> Timing:
    """Time ``call`` after ``warmup`` calls that are not counted."""
    cuda = device.startswith("cuda")
    for _ in range(warmup):
        call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Timing(statistics.median(times), min(times), max(times), peak)
