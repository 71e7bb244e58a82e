"""benchmarks/ops.py without a GPU: everything but the clock."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "ops.py"


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_ops", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_op_and_rival_runs(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is complete, and its ratios are those of its times."""

    def once(step: Callable[[int], Any], *_: int) -> float:
        step(0)
        return 2.0

    monkeypatch.setattr(benchmark, "median_ms", once)
    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr("nvae.ops.library.use_kernel", lambda impl, *_: impl != "reference")
    shape = (2, 8, 4, 4)
    report = benchmark.bench_shape(shape, 1, bandwidth=1e6)
    for op, values in report.items():
        assert None not in values["ms"].values(), op
        if op not in ("chain backward",):
            assert values["speedup over the best other"] == 1.0
    share = 2 * (2 * 8 * 4 * 4) * 2 / 1e6 / 2e-3
    assert report["forward"]["share of copy bandwidth"] == pytest.approx(share)
    json.dumps(report)


def test_kernels_off_reaches_every_op(benchmark: ModuleType) -> None:
    """What the training step without kernels is measured with."""
    from nvae.ops import bn_swish_depthwise

    with benchmark.kernels_off():
        x, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
        h = bn_swish_depthwise(x, vector, vector, torch.ones(3, 1, 3, 3), impl="cuda")
    assert h.sums is None


def test_without_a_gpu_it_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["ops.py"])
    assert benchmark.main() == 1
    assert capsys.readouterr().err == "error: this benchmark needs a CUDA device\n"
