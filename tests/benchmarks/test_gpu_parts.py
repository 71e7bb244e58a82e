"""What the acceptance's parts do, in small on the CPU."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.fit import compose_steps, fit_steps
from benchmarks.gpu import steps, use
from benchmarks.gpu.running import Setting
from benchmarks.sample import UNFOLDED
from tests.data.files import pictures, write_idx


def emitted(work: Callable[..., None], **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    work(lambda _, **values: found.update(values), **arguments)
    return found


def test_a_step_is_timed_as_train_py_makes_it() -> None:
    found = emitted(steps.time_step, overrides=steps.DRY, dry=True)
    assert found["fastest"] <= found["ms"] <= found["slowest"]
    assert found["images_per_second"] == pytest.approx(4e3 / found["ms"])
    rows = list(steps.step_figures("cifar10")({"bf16 reference": found}))
    assert rows[0][0] == "step cifar10, batch 4, bf16 reference"
    assert rows[0][2] == "1.00x reference"


def test_steps_are_real_and_counted() -> None:
    """Optimizer and guard are at work; a step of NaN is left out."""
    config = compose_steps(steps.DRY)
    torch.manual_seed(0)
    fitted = fit_steps(config, 4, bad_step=2)
    assert fitted.losses.isfinite().tolist() == [True, True, False, True]
    assert fitted.skipped == 1
    assert len(fitted.milliseconds) == 3
    fresh = config.build_model().state_dict()
    moved = [not torch.equal(fresh[k], w) for k, w in fitted.module.model.state_dict().items()]
    assert any(moved)


@pytest.mark.parametrize("way", steps.WAYS)
def test_ways_compose(way: str) -> None:
    for precision in steps.PRECISIONS:
        config = compose_steps(steps.overrides_of("cifar10", precision, way, dry=True))
        assert config.trainer.tf32 == (precision == "tf32")
        assert (config.kernels == "reference") == (way == steps.REFERENCE)


def test_a_step_that_was_not_captured_is_no_captured_step() -> None:
    fitted: Any = SimpleNamespace(replays=0)
    steps.check_captured(steps.WAYS[steps.KERNELS], fitted)
    with pytest.raises(RuntimeError, match="no step was captured"):
        steps.check_captured(steps.WAYS[steps.CAPTURED], fitted)
    steps.check_captured(steps.WAYS[steps.CAPTURED], SimpleNamespace(replays=5))  # type: ignore[arg-type]


def test_the_best_captured_step_is_judged() -> None:
    cases = {
        "bf16 reference": {"ms": 240.0},
        "bf16 captured": {"ms": 90.0},
        "bf16 captured and compiled": {"ms": 60.0},
        "float32 captured": {"ms": 1.0},
    }
    assert steps.captured_ms(cases) == 60.0
    assert steps.captured_speedup(cases) == 4.0
    ratio, time = steps.STEPS_BARS["cifar10"]
    assert (ratio.verdict(cases, "NVIDIA A100"), time.verdict(cases, "NVIDIA A100")) == (
        "met",
        "not judged",
    )
    assert time.verdict(cases, "NVIDIA H200") == "met"
    del cases["bf16 captured and compiled"]
    assert [bar.verdict(cases, "NVIDIA H200") for bar in (ratio, time)] == ["not met"] * 2
    assert steps.captured_speedup({"bf16 captured": {"ms": 90.0}}) is None


def test_equal_runs_are_equal_and_others_are_not() -> None:
    """On the CPU a run repeats itself in every bit, over a bad step and to beta = 1."""
    other = (*steps.DRY, "objective.kl_minimum=0.5")
    runs = {"eager": steps.DRY, steps.AGAIN: steps.DRY, steps.CAPTURED: other}
    found = emitted(steps.compare, overrides=runs, dry=True)
    again, different = found[steps.AGAIN], found[steps.CAPTURED]
    assert again == {"loss": 0.0, "weights": 0.0, "first": None, "equal": True, "skipped": 1}
    assert found["skipped"] == 1
    assert not different["equal"]
    assert different["first"] == 0
    assert different["loss"] > 0
    rows = list(steps.equality_figures({"float32": found}))
    assert [row[0].partition(" against")[0] for row in rows] == [steps.CAPTURED, steps.AGAIN]


@pytest.mark.parametrize(
    ("captured", "again", "met"),
    [
        ({"equal": True, "loss": 0.0, "skipped": 1}, None, 1.0),
        ({"equal": False, "loss": 9e-4, "skipped": 1}, None, 1.0),
        ({"equal": False, "loss": 2e-3, "skipped": 1}, {"loss": 0.0}, 0.0),
        ({"equal": False, "loss": 2e-3, "skipped": 1}, {"loss": 1e-3}, 1.0),
        ({"equal": False, "loss": None, "skipped": 1}, None, 0.0),
        ({"equal": True, "loss": 0.0, "skipped": 0}, None, 0.0),
    ],
)
def test_captured_is_eager_but_for_rounding(
    captured: dict[str, Any], again: dict[str, Any] | None, met: float
) -> None:
    """Not further off than an eager run is from itself, and no bad step was taken."""
    values = {"skipped": 1, steps.CAPTURED: captured} | ({steps.AGAIN: again} if again else {})
    assert steps.is_equal("float32")({"float32": values}) == met
    assert steps.is_equal("bf16")({"float32": values}) is None


def test_memory_is_estimated_and_measured() -> None:
    """Nothing is allocated on a GPU here, so the ratio is that of the numbers alone."""
    found = emitted(steps.measure_memory, overrides=steps.DRY, recompute=True, kernels=False)
    assert found["estimated_gib"] > 0
    assert found["peak_gib"] == found["ratio"] == 0
    row = next(steps.memory_figures({"cifar10 kernels": found}))
    assert row[0] == "peak memory cifar10 kernels, bf16"


def test_samples_by_each_way() -> None:
    found = emitted(use.sample, overrides=steps.DRY, batch=2, dry=True)
    assert list(found) == [UNFOLDED, "eager, folded"]
    assert found[UNFOLDED]["speedup"] == 1.0
    rows = list(use.sampling_figures({"tiny": found}))
    assert rows[0][2] == ""


def test_outcomes_of_tests_count_once() -> None:
    """A failing set-up, a file that cannot be imported: all are failures, with their line."""
    lines: list[str] = []
    outcomes = use.Outcomes(lambda line, **_: lines.append(line))

    def report(name: str, when: str, outcome: str, text: str = "") -> Any:
        return SimpleNamespace(
            nodeid=name, when=when, outcome=outcome, longrepr=text,
            failed=outcome == "failed", skipped=outcome == "skipped",
        )  # fmt: skip

    for when in ("setup", "call", "teardown"):
        outcomes.pytest_runtest_logreport(report("good", when, "passed"))
    outcomes.pytest_runtest_logreport(report("bad", "setup", "failed", "trace\nE  no memory\n"))
    outcomes.pytest_runtest_logreport(report("left out", "setup", "skipped"))
    outcomes.pytest_collectreport(report("file", "collect", "failed", "ImportError: lmdb"))
    assert outcomes.counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert lines == ["failed: bad: E  no memory", "failed: file: ImportError: lmdb"]
    assert set(outcomes.failures) == {"bad", "file"}


def test_failed_tests_and_files() -> None:
    good = {"passed": 3, "failed": 0, "ended": True}
    assert use.failed_tests({"a": good}) == 0
    assert use.failed_tests({"a": good, "b": {"passed": 1, "failed": 2, "ended": True}}) == 2
    assert use.failed_tests({"a": good, "b": {"error": "SIGSEGV", "ended": True}}) == 1
    assert use.failed_tests({"a": {"passed": 0, "failed": 0, "skipped": 4, "ended": True}}) is None


def test_every_file_with_gpu_tests_is_run() -> None:
    names = [case.name for case in use.TESTS.cases(Setting(False, None, Path(), 1.0))]
    assert "tests/ops/test_gpu.py" in names
    assert "tests/sampling/test_gpu.py" in names


@pytest.mark.slow
def test_a_training_from_a_folder(tmp_path: Path) -> None:
    """`train.py` itself: validations as they come, pictures and likelihood kept."""
    root, kept = tmp_path / "some files", tmp_path / "kept"
    write_idx(root, pictures(32, 28, 1), pictures(8, 28, 1, seed=1))
    found = emitted(use.train, data_root=str(root), folder=str(kept), seconds=60.0, dry=True)
    assert [each["step"] for each in found["validations"]] == [7, 14]
    assert found["test"]["images"] == 8
    assert {"samples.png", "metrics.jsonl", "test_likelihood.json"} <= {
        path.name for path in kept.iterdir()
    }
    first, second = use.training_figures({"fashion_mnist": found})
    assert "after 2 epochs, 14 steps" in first[2]
    assert second[1].startswith("negative ELBO ")


@pytest.mark.slow
def test_a_training_that_cannot_begin_says_why(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"train\.py ended with 2: error: "):
        emitted(use.train, data_root=str(tmp_path), folder=str(tmp_path), seconds=60.0, dry=True)
