"""Adamax's way on the CPU, piece by piece, against the formula: the same bits."""

import pytest
import torch
from torch import Tensor

from nvae.ops.adamax import PACKED, PIECE, adamax_cpu, adamax_formula
from nvae.ops.library import Impl, ops

from .test_adamax_kernel import SETTINGS, SHARE, copies, problem


def tensors() -> list[list[Tensor]]:
    """Small and large ones, both layouts, two types, a gradient laid out unlike its weight."""
    lists, _, _ = problem()
    for index, each in enumerate(lists):
        generator = torch.Generator().manual_seed(index)
        large = torch.randn(PIECE // 25 + 3, 2, 5, 5, generator=generator)
        unlike = torch.randn(8, 3, 4, 4, generator=generator)
        each.append(large.to(memory_format=torch.channels_last))
        each.append(unlike.to(memory_format=torch.channels_last) if index == 1 else unlike)
        each.append(torch.randn(PACKED, generator=generator, dtype=torch.float64))
        each.append(torch.randn(9, generator=generator, dtype=torch.float64))
    lists[3] = [norm.abs() for norm in lists[3]]
    return lists


@pytest.mark.parametrize("weight_decay", [0.0, 3e-4])
def test_the_formula_s_bits(weight_decay: float) -> None:
    """Over steps from the first one on, one of them left out; of moving averages too."""
    lists, rate = tensors(), torch.tensor(1e-2, dtype=torch.float64)
    lists.append([torch.ones_like(weight) for weight in lists[0]])
    want = copies(lists)
    steps = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    settings = *SETTINGS[:3], weight_decay
    for number, switch in enumerate((None, torch.tensor(0.0), torch.tensor(1.0), None)):
        for which, step, update in (
            (lists, steps[0], adamax_cpu),
            (want, steps[1], adamax_formula),
        ):
            gradients = [g * (number + 1) for g in which[1]]
            update(which[0], gradients, *which[2:4], step, rate, switch, *settings, which[4], SHARE)
    assert steps[0] == steps[1] == 3
    for index in (0, 2, 3, 4):
        for got, expected in zip(lists[index], want[index], strict=True):
            # where types are mixed, the formula rounds its constants to that of the first tensor
            tolerance = 0.0 if got.dtype == torch.float32 else 1e-6
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_left_out_changes_nothing() -> None:
    """Not a bit, whatever the gradient."""
    lists = tensors()
    lists[1][0][0, 0] = float("nan")
    before, step = copies(lists), torch.tensor(4.0, dtype=torch.float64)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    adamax_cpu(*lists, step, rate, torch.tensor(1.0), *SETTINGS)
    assert step == 4
    for index in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(lists[index], before[index], strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_without_kernels_the_cpu_goes_its_own_way(impl: Impl) -> None:
    """The formula would have overwritten the gradients of a step that is left out."""
    lists = tensors()
    before, step = copies(lists), torch.zeros((), dtype=torch.float64)
    rate = torch.tensor(1e-2, dtype=torch.float64)
    ops(impl).adamax_(*lists, step, rate, torch.tensor(1.0), *SETTINGS, [], None)
    assert all(torch.equal(a, b) for a, b in zip(lists[1], before[1], strict=True))


def test_versions_are_counted() -> None:
    """What was derived from a weight is made anew, see nvae.models.folding."""
    lists = tensors()
    versions = [weight._version for weight in lists[0]]
    step, rate = torch.zeros((), dtype=torch.float64), torch.tensor(1e-2, dtype=torch.float64)
    adamax_cpu(*lists, step, rate, None, *SETTINGS)
    assert all(w._version > version for w, version in zip(lists[0], versions, strict=True))
