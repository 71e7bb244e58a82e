"""What `sample.py` and `evaluate.py` share: device, progress, provenance, BN recalibration."""

import ctypes
import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvae.bn_recalibration import (
    RecalibratedStatistics,
    RecalibrationSettings,
    cache_path,
    load_statistics,
    recalibrate,
    save_statistics,
)
from nvae.gpus import is_gpu_usable
from nvae.models import HierarchicalVAE

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST = 1 << 30
_LARGEST_OF_OLD_GLIBC = 1 << 25


def keep_freed_memory() -> bool:
    """Keep freed memory inside the process, for work on the CPU.

    A step allocates and frees hundreds of megabytes of activations. glibc hands large free blocks
    back to the kernel at once, and the next allocation faults every page in again: about a fifth
    of a training step's time on the CPU. The process then keeps the peak of what it used, which
    training reaches in every step anyway.

    Returns:
        Whether the allocator listens: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    blocks = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(
        _M_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC
    )
    kept = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 1 << 26)
    return bool(blocks and kept)


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Inside, whether matrix products and convolutions of float32 may round to TF32 on a GPU.

    Both are said, for torch's own defaults differ (convolutions may, products may not). The flags
    are those that Lightning and torch's compiler read; torch's newer ``fp32_precision`` makes their
    reading an error, so the two are not mixed.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def precision_name(*, tf32: bool) -> str:
    """The arithmetic of an evaluation, as its results name it."""
    return "float32 with tf32" if tf32 else "float32"


def open_device(name: str, *, tf32: bool) -> torch.device:
    """The device called ``name``; ``auto`` takes a GPU where there is one.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tf32: allow the shorter mantissa of TF32 in matrix products and convolutions. It is fast
            and moves a likelihood in its fourth digit.

    Raises:
        ValueError: no such device here, or with ``auto`` a GPU that is of no use.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::([0-9]{1,6}))?", name)
    if not found:
        raise ValueError(f"device={name} is unknown; allowed: auto, cpu, cuda, cuda:N")
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if name == "auto":
        return torch.device("cuda" if is_gpu_usable("device=cpu") else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index = int(found[1] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={name} is not here: torch sees {torch.cuda.device_count()} CUDA device(s); "
            "device=cpu works everywhere"
        )
    return torch.device("cuda" if found[1] is None else f"cuda:{index}")


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
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
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


_PACKAGES = ("nvae", "numpy")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def versions(device: torch.device) -> dict[str, str]:
    """Software and device, for a manifest."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree without installing
            found[package] = "not installed"
    found["device"] = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return found


@contextmanager
def recalibrated(
    model: HierarchicalVAE,
    checkpoint: Path,
    temperature: Sequence[float],
    *,
    batches: int,
    batch_size: int,
    seed: int,
    shown: bool = True,
) -> Iterator[None]:
    """Statistics for ``temperature`` (one a group) inside the block."""
    settings = RecalibrationSettings(
        tuple(float(t) for t in temperature), batches, batch_size, seed
    )
    with _statistics(model, checkpoint, settings, shown).applied(model):
        yield


def _statistics(
    model: HierarchicalVAE, checkpoint: Path, settings: RecalibrationSettings, shown: bool
) -> RecalibratedStatistics:
    path = cache_path(checkpoint, settings)
    found = load_statistics(path, settings, model)
    if found is None:
        with progress_bar("BN recalibration", settings.batches, shown=shown) as advance:
            found = recalibrate(model, settings, advance)
        if shown:
            _keep(found, path)
    return found


def _keep(statistics: RecalibratedStatistics, path: Path) -> None:
    try:
        save_statistics(statistics, path)
    except OSError as error:  # a read-only folder is no reason to lose the passes
        print(f"BN statistics are not kept for another time: {error}", file=sys.stderr)
