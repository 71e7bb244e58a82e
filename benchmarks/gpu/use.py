"""What a user does on a GPU: run the tests, draw samples, train."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.running import Bar, Case, Cases, Emit, Part, Setting
from benchmarks.gpu.steps import DRY, PRESETS
from benchmarks.measure import measure
from benchmarks.sample import UNFOLDED, check_way, ways_to_sample
from nvae.cli.common import float32_products
from nvae.cli.config import compose_train
from nvae.command_line import setting

ROOT = Path(__file__).parents[2]
MARK = "pytest.mark.gpu"


class Outcomes:
    """A pytest plugin that counts and tells failures as they come."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.failures: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's set-up, call or tear-down; a test counts once, by its worst."""
        if report.failed:
            self._fail(report)
        elif report.skipped or report.when == "call":
            self.counts[report.outcome] += 1
            if sum(self.counts.values()) % 50 == 0:
                self.tell()

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._fail(report)

    def _fail(self, report: Any) -> None:
        self.counts["failed"] += 1
        text = str(report.longrepr)
        self.failures[report.nodeid] = text[-4000:]
        shown = f"failed: {report.nodeid}: {last_line(text)}"
        self._emit(shown, **self.counts, failures=self.failures)

    def tell(self) -> None:
        """All counts."""
        shown = ", ".join(f"{n} {outcome}" for outcome, n in self.counts.items())
        self._emit(shown, **self.counts, failures=self.failures)


def run_tests(emit: Emit, file: str) -> None:
    """Run a file's tests that need a GPU; plugins that the settings name may be missing."""
    import pytest

    os.chdir(ROOT)
    outcomes = Outcomes(emit)
    code = pytest.main(
        ["-m", "gpu", "-q", "--continue-on-collection-errors", f"--rootdir={ROOT}", file],
        plugins=[outcomes],
    )
    outcomes.tell()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}")


def test_cases(given: Setting) -> list[Case]:
    """One a file that has such tests."""
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if MARK in path.read_text() and path.parent.name != "benchmarks"
    ]
    if given.dry:
        found = [name for name in found if "sampling" in name]
    return [Case(name, run_tests, {"file": name}, seconds=given.seconds) for name in found]


def test_figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
    """A row a file."""
    for name, values in cases.items():
        if "passed" in values:
            counts = f"{values['passed']} passed, {values['failed']} failed"
            yield f"`pytest -m gpu {name}`", counts, f"{values['skipped']} skipped"


def failed_tests(cases: Cases) -> float | None:
    """Tests that fail, and files that do not come to their end; None: none has run."""
    if not any(values.get("passed") or values.get("failed") for values in cases.values()):
        return None
    broken = sum("error" in values or not values.get("ended") for values in cases.values())
    return broken + sum(values.get("failed", 0) for values in cases.values())


def sample(emit: Emit, overrides: Sequence[str], batch: int, dry: bool) -> None:
    """Emit the time of a batch by each way, in float32, as soon as it is known."""
    device = "cpu" if dry else "cuda"
    torch.backends.cudnn.benchmark = not dry
    torch.manual_seed(0)
    model = compose_train(overrides).build_model().to(device).eval()
    with float32_products(tf32=False):
        ways = ways_to_sample(model, batch, compiled=not dry)
        reference = None
        for name, draw in ways.items():
            check_way(ways, name, device)
            timing = measure(draw, device, *((1, 3) if dry else (5, 20)))
            reference = reference or timing.median
            found = {
                "ms": timing.median, "fastest": timing.fastest, "slowest": timing.slowest,
                "images_per_second": 1e3 * batch / timing.median,
                "speedup": reference / timing.median,
            }  # fmt: skip
            emit(timing.row(name, batch), **{name: found})


def sampling_cases(given: Setting) -> list[Case]:
    """The presets with 16 images at once, and cifar10 with one."""
    if given.dry:
        return [Case("tiny, batch 2", sample, {"overrides": DRY, "batch": 2, "dry": True})]
    chosen = (("cifar10", 16), ("celeba64", 16), ("cifar10", 1))
    return [
        Case(
            f"{preset}, batch {batch}",
            sample,
            {"overrides": PRESETS[preset], "batch": batch, "dry": False},
            seconds=given.seconds / 2,
        )
        for preset, batch in chosen
    ]


def sampling_figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
    """A row a way."""
    for case, values in cases.items():
        for way, found in values.items():
            if isinstance(found, dict) and "ms" in found:
                spread = f"({found['fastest']:.1f} to {found['slowest']:.1f})"
                speed = f"{found['images_per_second']:.0f} images/s"
                beside = "" if way == UNFOLDED else f"{found['speedup']:.2f}x {UNFOLDED}"
                yield f"samples {case}, {way}", f"{found['ms']:.1f} ms {spread}, {speed}", beside


TRIAL_STEPS = 300
TRAINING_IMAGES = 55_000
SHARE_OF_TRAINING = 0.75
"""Of the time that is left after the trial; validations, pictures and the report take the rest."""

MOST_EPOCHS = 100


def train(emit: Emit, data_root: str, folder: str, seconds: float, dry: bool) -> None:
    """Train on Fashion-MNIST with `train.py`, for as many epochs as the time allows.

    A short run says how fast it goes. Emitted are validations as they come and the report's test
    likelihood; pictures, metrics and likelihood are copied to the folder.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary)
        words = [
            "experiment=fashion_mnist", setting("data.source", data_root),
            setting("data.root", str(runs / "data")),
            "data.download=false", setting("runs_dir", str(runs)), "logger.tensorboard=null",
            "logger.csv=null", "report.importance_samples=10", *(DRY_TRAINING if dry else ON_GPU),
        ]  # fmt: skip
        trial = ["name=trial", f"trainer.max_steps={4 if dry else TRIAL_STEPS}"]
        every = ["trainer.log_every_n_steps=2" if dry else "trainer.log_every_n_steps=50"]
        alone = ["trainer.limit_val_batches=1", "report.when=never"]
        for _ in follow(runs / "trial", [*words, *trial, *every, *alone]):
            pass
        speed = last_of(runs / "trial", "train/images_per_second")
        left = seconds - (time.monotonic() - begin)
        epochs = 2
        if not dry:
            epochs = int(SHARE_OF_TRAINING * left * speed / TRAINING_IMAGES)
            epochs = max(1, min(MOST_EPOCHS, epochs))
        emit(f"trial: {speed:.0f} images/s; {epochs} epochs", trial_images_per_second=speed)
        apart = max(1, epochs // 8)
        run = ["name=run", f"trainer.max_epochs={epochs}", *every]
        run += [f"trainer.check_val_every_n_epoch={apart}"]
        run += [f"callbacks.{name}.every_epochs={apart}" for name in ("pictures", "checkpoint")]
        validations: list[dict[str, float]] = []
        for line in follow(runs / "run", [*words, *run]):
            if "valid/negative_elbo" in line:
                step, elbo = line["step"], line["valid/negative_elbo"]
                validations.append({"step": step, "negative_elbo": elbo})
                shown = f"step {step}: validation negative ELBO {elbo:.2f} nats"
                emit(shown, epochs=epochs, validations=validations)
                keep(runs / "run", Path(folder))
            if "train/images_per_second" in line:
                emit("", images_per_second=line["train/images_per_second"])
        keep(runs / "run", Path(folder))
        report = runs / "run" / "test_likelihood.json"
        if report.exists():
            test = json.loads(report.read_text())
            emit("the report's test likelihood is there", test=test)


DRY_TRAINING = (
    "data.train_size=null", "data.valid_size=4", "data.test_size=null", "data.batch_size=4",
    "model.encoder_channels=4", "model.decoder_channels=4", "model.latent_channels=2",
    "model.groups_per_scale=1", "trainer.accelerator=cpu", "trainer.cpu_threads=1",
    "optimizer.warmup_epochs=0", "report.samples=2", "report.temperatures=[1.0]",
)  # fmt: skip
ON_GPU = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")


def follow(run: Path, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Start `train.py` and give the lines of its `metrics.jsonl` as they are written.

    Raises:
        RuntimeError: it has failed; what it printed is in the log.
    """
    command = [sys.executable, str(ROOT / "train.py"), *words]
    path, read = run / "metrics.jsonl", 0
    errors = run.with_suffix(".err")
    with errors.open("wb") as file, subprocess.Popen(command, cwd=ROOT, stderr=file) as process:
        is_over = False
        while not is_over:
            is_over = process.poll() is not None
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]
            yield from map(json.loads, whole[read:])
            read = len(whole)
            if not is_over:
                time.sleep(0.5)
    said = errors.read_text(errors="replace")
    print(said)
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}: {last_line(said)}")


def last_line(text: str) -> str:
    """The last that is not empty; an exception's message, mostly."""
    return (text.strip().splitlines() or [""])[-1]


def last_of(run: Path, name: str) -> float:
    """The last value of a metric of a run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return float([line[name] for line in lines if name in line][-1])


def keep(run: Path, folder: Path) -> None:
    """Copy a run's pictures, metrics and likelihood."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*run.glob("*.png"), *run.glob("pictures/*.png"), *run.glob("*.json*")):
        shutil.copy(path, folder / path.name)


def training_cases(given: Setting) -> list[Case]:
    """One run, which takes all the time there is."""
    arguments = {
        "data_root": given.data_root,
        "folder": str(given.folder / "fashion_mnist"),
        "seconds": given.seconds,
        "dry": given.dry,
    }
    return [Case("fashion_mnist", train, arguments, seconds=given.seconds)]


def training_figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
    """A row of the training, and one of the test images."""
    for name, values in cases.items():
        if not values.get("validations"):
            continue
        last = values["validations"][-1]
        figure = f"validation negative ELBO {last['negative_elbo']:.2f} nats"
        beside = f"after {values['epochs']} epochs, {last['step']} steps"
        if "images_per_second" in values:
            beside += f", {values['images_per_second']:.0f} images/s"
        yield f"training, {name}, bf16", figure, beside
        if "test" in values:
            test = values["test"]
            elbo = test["negative_elbo"]["mean"]
            yield f"test images, {name}", f"negative ELBO {elbo:.2f} nats", ""


TESTS = Part(
    "tests", test_cases, test_figures,
    (Bar("tests that need a GPU and fail", 0, "", failed_tests, at_most=True),),
)  # fmt: skip
SAMPLING = Part("sampling", sampling_cases, sampling_figures)
TRAINING = Part("training", training_cases, training_figures)
