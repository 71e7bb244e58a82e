"""The ops part of the acceptance without a GPU: everything but the clock."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import ops


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All that a tiny shape emits where every call takes 2 ms and nothing is compiled."""

    def once(step: Callable[[int], Any], ring: int) -> dict[str, float]:
        step(ring - 1)
        return {"ms": 2.0, "fastest": 1.0, "slowest": 3.0}

    monkeypatch.setattr(ops, "host_clock", once)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found: dict[str, Any] = {}
    ops.measure_shape(lambda _, **values: found.update(values), (2, 8, 4, 4), dry=True)
    return found


def test_every_op_and_rival_runs(emitted: dict[str, Any]) -> None:
    """The report is complete, and its ratios are those of its times."""
    bandwidth = emitted["copy_bytes_per_second"]
    assert bandwidth == 2 * (2 * 2 * 8 * 4 * 4) / 2e-3
    for op in ops.PASSES:
        times = emitted[op]["times"]
        assert [each for each in times.values() if "error" in each] == []
        assert ops.OURS in times
        assert len(times) > 1
    assert emitted["forward"]["speedup"] == 1.0
    share = 2 * (2 * 8 * 4 * 4) * 2 / bandwidth / 2e-3
    assert emitted["forward"]["share_of_copy"] == pytest.approx(share)
    json.dumps(emitted)


def test_all_rivals_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival that computed something else would be no rival."""
    made: list[torch.Tensor] = []

    def keep(step: Callable[[int], Any], ring: int) -> dict[str, float]:
        made.append(_flat(step(0)))
        return {"ms": 1.0, "fastest": 1.0, "slowest": 1.0}

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shape = ops.Shape((2, 8, 4, 4), "cpu", lambda *_, **__: None, 1)
    for images in (shape.x, shape.dy):
        same = [t.contiguous() for t in images[torch.channels_last]]
        images[torch.contiguous_format] = same
    shape.clock = keep
    shape.depthwise()
    for first in range(0, len(made), 5):  # five implementations of each op
        ours, *others = made[first : first + 5]
        for other in others:
            torch.testing.assert_close(ours, other, rtol=2e-2, atol=2e-2)


def _flat(made: Any) -> torch.Tensor:
    tensors = [made] if isinstance(made, torch.Tensor) else made
    return torch.cat([t.float().flatten() for t in tensors if t is not None and t.numel()])


def test_a_rival_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ops.Shape((1, 2, 4, 4), "cpu", lambda *_, **__: None, 1)

    def broken(_: int) -> None:
        raise RuntimeError("no kernel image")

    found = shape.times({ops.OURS: lambda _: None, "cuDNN": broken})
    assert "ms" in found[ops.OURS]
    assert found["cuDNN"] == {"error": "RuntimeError: no kernel image"}
    assert list(ops.figures({"1x2x4x4": {"forward": {"times": {ops.OURS: found["cuDNN"]}}}})) == [
        ("forward, 1x2x4x4", "failed", "RuntimeError: no kernel image")
    ]


def test_backward_is_the_difference_of_both_passes() -> None:
    error = {"error": "out of memory"}
    forward = {"nvae": {"ms": 1.0}, "contiguous": {"ms": 2.0}}
    both = {"nvae": {"ms": 4.0}, "contiguous": error}
    assert ops.backward_of(forward, both) == {"nvae": {"ms": 3.0}, "contiguous": error}


def test_bars_are_those_of_the_judged_shape() -> None:
    times = {"nvae": {"ms": 1.0}}
    fast = {op: {"times": times, "speedup": 2.5, "share_of_copy": 0.6} for op in ops.PASSES}
    slow = {op: {"times": times, "speedup": 1.5, "share_of_copy": 0.3} for op in ops.PASSES}
    cases = {ops.JUDGED: fast, "200x1536x4x4": slow}
    assert {bar.verdict(cases, "NVIDIA A100") for bar in ops.BARS} == {"met"}
    assert {bar.verdict({ops.JUDGED: slow}, "NVIDIA H200") for bar in ops.BARS} == {"not met"}
    assert {bar.verdict({}, "NVIDIA H200") for bar in ops.BARS} == {"not measured"}
