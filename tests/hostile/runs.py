"""Training commands in processes of their own, forked from one that has imported everything."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import PATIENCE

TINY = [
    "data=random", "data.image_size=8", "data.channels=1", "data.bits=4", "data.train_size=64",
    "data.valid_size=8", "data.test_size=8", "data.batch_size=8", "model.num_scales=1",
    "model.groups_per_scale=2", "model.preprocess_cells=1", "model.postprocess_cells=1",
    "model.encoder_channels=4", "model.decoder_channels=4", "model.latent_channels=2",
    "trainer.cpu_threads=1", "trainer.max_epochs=2", "optimizer.warmup_epochs=0",
    "trainer.log_every_n_steps=1", "logger.tensorboard=null", "logger.csv=null",
    "callbacks.pictures.every_epochs=0", "report.importance_samples=0", "report.samples=2",
    "report.temperatures=[1.0]", "name=r",
]  # fmt: skip
"""Two epochs of eight steps, half a second."""


@dataclasses.dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Job:
    """One `train.py` with its own folder to work in."""

    def __init__(
        self, folder: Path, *overrides: str, before: Callable[[], None] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        names = [folder / f"{time.monotonic_ns()}.{kind}" for kind in ("out", "err")]
        self._out, self._err = names
        for name in names:
            name.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "nvae.cli.train", "tensorboard"])
        self.process = context.Process(
            target=_work, args=(folder, [*TINY, *overrides], *names, before)
        )
        self.process.start()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the command does."""
        while not condition():
            if not self.process.is_alive():
                raise AssertionError(f"it has ended: {self.ended()}")
            time.sleep(0.01)

    def said(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    def signal(self, number: int) -> None:
        """As `kill` does."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ended(self) -> Ended:
        """Wait for the end."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it does not end: {self._out.read_text()}{self._err.read_text()}")
        code = self.process.exitcode
        assert code is not None
        return Ended(code, self._out.read_text(), self._err.read_text())


def _work(
    folder: Path, overrides: list[str], out: Path, err: Path, before: Callable[[], None] | None
) -> None:
    from nvae.cli.train import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = ["train.py", *overrides]
    if before is not None:
        before()
    main()


def train(folder: Path, *overrides: str, before: Callable[[], None] | None = None) -> Ended:
    """Run to the end."""
    return Job(folder, *overrides, before=before).ended()


def assert_one_line(ended: Ended, *texts: str) -> None:
    """A failure as users should see it."""
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("\n") == 1, ended
    assert len(ended.err) < 520, ended
    for text in texts:
        assert text in ended.err, ended


def numeric_settings(cls: type, prefix: str = "") -> list[tuple[str, bool]]:
    """Dotted name of every setting that takes a number, and whether it takes a list of them."""
    found = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found += numeric_settings(typing.cast(type, kind), f"{prefix}{name}.")
        elif takes(kind, float):
            kinds = kind, *typing.get_args(kind)
            found.append((prefix + name, any(typing.get_origin(each) is list for each in kinds)))
    return found


def takes(kind: Any, wanted: type) -> bool:
    """Whether an annotation mentions a type."""
    return kind is wanted or any(takes(each, wanted) for each in typing.get_args(kind))


def has_logged(folder: Path) -> bool:
    """Whether the run has made a step."""
    return (folder / "runs" / "r" / "metrics.jsonl").exists()
