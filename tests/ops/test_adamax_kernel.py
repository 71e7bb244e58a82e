"""The Adamax kernel's unchanged source, run on the CPU, against the formula beside it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvae.ops import adamax
from nvae.ops.adamax import CHUNK, adamax_formula, adamax_kernel
from nvae.ops.multi_tensor import _copied_table

from .host import HostLauncher
from .test_machine_code import LIMITS, disassemble, tool

SHAPES = [(3, 4), (7,), (2, 3, 5, 5), (), (CHUNK,), (2 * CHUNK + 13,), (1, 5), (6, 1, 3, 3)]
SETTINGS = (0.9, 0.999, 1e-3, 3e-4)  # beta1, beta2, eps, weight decay
SHARE = torch.tensor(0.25, dtype=torch.float64)


def problem(seed: int = 0) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """Weights, gradients, averages and norms; step; learning rate."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(4)]
    lists[0][2], lists[1][2], lists[2][2], lists[3][2] = (
        each[2].contiguous(memory_format=torch.channels_last) for each in lists
    )
    # a gradient that begins between two vectors, as views of DDP's buckets may
    lists[1][5] = torch.randn(SHAPES[5][0] + 1, generator=generator)[1:]
    # other strides over the only input channel, as a depthwise convolution's gradient has them
    lists[1][7] = lists[1][7].as_strided((6, 1, 3, 3), (9, 1, 3, 1))
    lists[3] = [norm.abs() for norm in lists[3]]
    return lists, torch.tensor(4.0, dtype=torch.float64), torch.tensor(1e-2, dtype=torch.float64)


def moving_averages(lists: list[list[Tensor]]) -> list[Tensor]:
    """Of the weights, laid out like them; one begins between two vectors."""
    moving = [weight + torch.randn_like(weight) for weight in lists[0]]
    moving[1] = torch.randn(SHAPES[1][0] + 1)[1:]
    return moving


def copies(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.clone(memory_format=torch.preserve_format) for t in each] for each in lists]


def check_adamax(launcher: HostLauncher, with_average: bool = False) -> None:
    """Three steps, the second left out, against the formula in float64."""
    lists, step, rate = problem()
    moving = moving_averages(lists) if with_average else []
    share = SHARE if with_average else None
    wide = [[t.double() for t in each] for each in lists]
    wide_moving = [t.double() for t in moving]
    wide_step = step.clone()
    for switch in (None, torch.tensor(1.0), torch.tensor(0.0)):
        gradients = [g.clone() for g in wide[1]]  # the formula overwrites them
        adamax_formula(
            wide[0], gradients, *wide[2:], wide_step, rate, switch, *SETTINGS, wide_moving, share
        )
        adamax_kernel(*lists, step, rate, switch, *SETTINGS, moving, share, launcher=launcher)
        assert step == wide_step
    got = [*lists[0], *lists[2], *lists[3], *moving]
    want = [*wide[0], *wide[2], *wide[3], *wide_moving]
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)


def check_average(launcher: HostLauncher) -> None:
    check_adamax(launcher, with_average=True)


def test_agrees_with_the_formula(host: HostLauncher) -> None:
    check_adamax(host)


def test_a_moving_average_goes_along(host: HostLauncher) -> None:
    """By no launch more; weights and state get the bits that they get without."""
    check_average(host)
    assert len(host.launches) == 6
    results = []
    for with_average in (False, True):
        lists, step, rate = problem()
        more = (moving_averages(lists), SHARE) if with_average else ()
        adamax_kernel(*lists, step, rate, None, *SETTINGS, *more, launcher=host)
        results.append([*lists[0], *lists[2], *lists[3]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_order_of_threads_does_not_change_a_bit(host_folder: Path) -> None:
    results = []
    for descending in (False, True):
        torch.manual_seed(0)
        lists, step, rate = problem()
        moving = moving_averages(lists)
        launcher = HostLauncher(host_folder, descending=descending)
        adamax_kernel(*lists, step, rate, None, *SETTINGS, moving, SHARE, launcher=launcher)
        results.append([*lists[0], *lists[2], *lists[3], *moving])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_left_out_changes_nothing(bad: float, host: HostLauncher) -> None:
    """Not a bit, and the gradients stay as they are for whoever looks at them."""
    lists, step, rate = problem()
    lists[1][0][0, 0] = bad
    moving = moving_averages(lists)
    before = copies([*lists, moving])
    switch = torch.tensor(1.0)
    adamax_kernel(*lists, step, rate, switch, *SETTINGS, moving, SHARE, launcher=host)
    assert step == 4
    for each, kept in zip([*lists, moving], before, strict=True):
        for now, was in zip(each, kept, strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def test_launches_do_not_grow_with_the_tensors(host: HostLauncher) -> None:
    """Two a step; every element of every tensor has one block."""
    lists, step, rate = problem()
    adamax_kernel(*lists, step, rate, None, *SETTINGS, launcher=host)
    first, second = host.launches
    assert (first.blocks, first.kernel) == (1, "adamax")
    assert second.blocks == sum(-(-t.numel() // CHUNK) for t in lists[0])


def test_the_table_is_kept_while_addresses_stay(host: HostLauncher) -> None:
    """Else every step would copy it to the device."""
    _copied_table.cache_clear()
    lists, step, rate = problem()
    for _ in range(3):
        adamax_kernel(*lists, step, rate, None, *SETTINGS, launcher=host)
    assert _copied_table.cache_info().misses == 1
    lists[1][0] = lists[1][0].clone()
    adamax_kernel(*lists, step, rate, None, *SETTINGS, launcher=host)
    assert _copied_table.cache_info().misses == 2


@pytest.mark.parametrize("other", ["layout", "average's layout", "type"])
def test_what_the_kernel_cannot_read_takes_the_formula(other: str, host: HostLauncher) -> None:
    """It would take the elements in another order, or other bytes."""
    lists, step, rate = problem()
    lists.append(moving_averages(lists))
    if other == "type":
        lists = [[t.double() for t in each] for each in lists]
    else:
        index = 1 if other == "layout" else 4
        lists[index][2] = lists[index][2].contiguous()
    want, want_step = copies(lists), step.clone()
    adamax_formula(*want[:4], want_step, rate, None, *SETTINGS, want[4], SHARE)
    adamax_kernel(*lists[:4], step, rate, None, *SETTINGS, lists[4], SHARE, launcher=host)
    assert not host.launches
    for index in (0, 4):
        assert all(torch.equal(a, b) for a, b in zip(lists[index], want[index], strict=True))


def test_autograd_learns_of_the_change(host: HostLauncher) -> None:
    """Derived weights are kept by their version: a step must count as one."""
    lists, step, rate = problem()
    lists.append(moving_averages(lists))
    changed = [*lists[0], *lists[4]]
    versions = [w._version for w in changed]
    adamax_kernel(*lists[:4], step, rate, None, *SETTINGS, lists[4], SHARE, launcher=host)
    assert all(w._version > v for w, v in zip(changed, versions, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("moving", [0, 1])
@pytest.mark.parametrize("arch", LIMITS)
def test_machine_code(arch: int, moving: int, tmp_path: Path) -> None:
    """Few registers, nothing in local memory, 16-byte accesses, each tensor's once."""
    macros = (
        ("ELEM", 32), ("VIO", 4), ("MODE", 1), ("MOVING", moving),
        ("THREADS", adamax.THREADS), ("CHUNK", CHUNK),
    )  # fmt: skip
    registers, stack, local, opcodes = disassemble(tool(), "adamax", macros, arch, tmp_path)
    assert registers <= 64
    assert stack == local == 0
    assert sum(o.startswith("LDG.E.128") for o in opcodes) >= 4 + moving
    assert sum(o.startswith("STG.E.128") for o in opcodes) >= 3 + moving
