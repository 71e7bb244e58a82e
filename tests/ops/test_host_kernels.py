"""The CUDA kernels' unchanged source, run on the CPU (host_shim.h), against float64 autograd."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvae.ops import kernels, reference

from .cases import Case, make_problem, relative_error, tolerance
from .host import H100, SMALL, HostLauncher

HALF, BFLOAT = torch.float16, torch.bfloat16
CASES = [
    Case(2, 64, 16, 16),  # one tile, whole channel block
    Case(3, 90, 7, 9),  # odd sizes, C not divisible by 8
    Case(2, 90, 5, 6, dtype=BFLOAT),
    Case(1, 24, 4, 4, dtype=BFLOAT, fused=False),  # a 4x4 image, batch 1
    Case(9, 24, 4, 4, dtype=BFLOAT),  # several images a block, the last group not full
    Case(5, 40, 4, 4, k=3, dtype=HALF),
    Case(1, 7, 3, 5, dtype=BFLOAT),  # odd C: element-wise accesses
    Case(2, 7, 6, 5, dtype=HALF, fused=False),
    Case(1, 130, 20, 18, dtype=BFLOAT),  # several tiles and channel blocks, both cut
    Case(2, 16, 9, 12, s=2),
    Case(1, 12, 7, 7, k=3, s=2, dtype=BFLOAT),
    Case(1, 33, 6, 6, s=2, fused=False),
    Case(1, 8, 12, 13, k=7),
    Case(1, 6, 9, 9, k=9, dtype=HALF, fused=False),
    Case(1, 5, 11, 6, k=11),
    Case(2, 8, 8, 7, k=11, s=2),
    Case(1, 20, 4, 9, k=3),  # three patches across: threads that are no power of two
    Case(1, 1, 1, 1),
]
WALKED = Case(9, 70, 9, 34)  # several rows of partial sums, several columns of channels


def check_depthwise(case: Case, launcher: HostLauncher) -> None:
    """Forward and backward of one case against the truth; AssertionError where they differ."""
    p = make_problem(case)
    bn = p.bn if case.fused else None
    close = tolerance(case.dtype)

    y, sums = kernels.depthwise_forward(p.x, p.weight, case.s, bn, case.fused, launcher)
    assert y.dtype == case.dtype
    assert relative_error(y, p.y) < close
    if case.fused:  # sums are those of the stored tensor, not of the values before rounding
        assert relative_error(sums, reference.channel_sums(y)) < 1e-5

    through = (p.y.to(case.dtype), p.dsums) if case.fused else None
    dx, dw, bn_sums = kernels.depthwise_backward(
        p.dy, p.x, p.weight, case.s, bn, through, launcher=launcher
    )
    assert dx.dtype == case.dtype
    assert relative_error(dx, p.dx) < close
    assert relative_error(dw, p.dweight) < close
    if case.fused:
        params, moments = kernels.bn_gradients(bn_sums, p.bn[0], p.bn[3], launcher)
        assert relative_error(params, p.dparams) < close
        assert relative_error(moments, p.dmoments) < close


def check_batch_norm(case: Case, launcher: HostLauncher) -> None:
    """The element-wise passes of one case against their formulas in float64."""
    p = make_problem(case)
    close = tolerance(case.dtype)
    wide, bn = p.x.double(), tuple(t.double() for t in p.bn)
    dy = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)

    for swish in (False, True):
        y = kernels.bn_forward(p.x, p.bn, swish, launcher)
        assert relative_error(y, reference.bn_forward(wide, *bn, swish=swish)) < close
        dx, sums = kernels.bn_backward(dy, p.x, p.bn, swish, launcher)
        dx64, sums64 = reference.bn_backward(dy.double(), wide, *bn, swish=swish)
        assert relative_error(dx, dx64) < close
        assert relative_error(sums, sums64) < 1e-5
    assert relative_error(kernels.channel_sums(p.x, launcher), reference.channel_sums(wide)) < 1e-5
    folded = kernels.fold(dy, p.x, p.dsums, launcher)
    assert relative_error(folded, reference.fold(dy.double(), wide, p.dsums)) < close


def check_moments(launcher: HostLauncher) -> None:
    """The statistics' vectors against autograd through their formula."""
    gen = torch.Generator().manual_seed(0)
    n, c = 50, 300
    x = torch.randn(n, c, generator=gen, dtype=torch.float64) + 3
    sums = torch.stack([x.sum(0), x.square().sum(0)])
    sums[1, 7] = sums[0, 7] ** 2 / n - 1e-9  # rounding put the variance below zero
    for elements in (None, torch.tensor(float(n), dtype=torch.float64)):
        count = n if elements is None else 0  # the device's number wins
        got = kernels.moments(sums, elements, count, 1e-5, launcher)
        leaf = sums.clone().requires_grad_()
        want = reference.moments(leaf, None, n, 1e-5)
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
        dmean, drstd = torch.randn(2, c, generator=gen, dtype=torch.float64)
        (want[0] @ dmean + want[1] @ drstd).backward()
        assert leaf.grad is not None
        got = kernels.moments_backward(sums, elements, count, 1e-5, dmean, drstd, launcher)
        torch.testing.assert_close(got, leaf.grad, rtol=1e-9, atol=1e-12)


def check_track(launcher: HostLauncher) -> None:
    """Running statistics against the formula, the number of elements from host and device."""
    gen = torch.Generator().manual_seed(0)
    c, n, repeats, momentum = 300, 50.0, 4.0, 0.05
    mean, var = torch.randn(2, c, generator=gen, dtype=torch.float64).abs()
    for elements in (None, torch.tensor(n, dtype=torch.float64)):
        ours = [torch.randn(c, generator=gen) for _ in range(2)]
        theirs = [t.clone() for t in ours]
        count = n if elements is None else 0.0
        versions = [t._version for t in ours]
        kernels.track(*ours, mean, var, elements, count, repeats, momentum, launcher)
        reference.track(*theirs, mean, var, elements, count, repeats, momentum)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert all(t._version > v for t, v in zip(ours, versions, strict=True))


def check_last_block(launcher: HostLauncher) -> None:
    """Sums by whichever block is last are correct, also at a kernel's next launch, and have
    the same bits in any order of the blocks, of which the launcher takes another every time."""
    launcher.pretended = replace(SMALL, multiprocessors=8)  # more rows of partial sums
    p = make_problem(WALKED)
    runs = []
    for _ in range(4):
        forward = kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, launcher)
        backward = kernels.depthwise_backward(p.dy, p.x, p.weight, 1, p.bn, launcher=launcher)
        sums = kernels.channel_sums(p.x, launcher)
        runs.append([*forward, *backward, sums])
        assert relative_error(forward[1], p.sums) < 1e-5
        assert relative_error(sums, reference.channel_sums(p.x.double())) < 1e-5
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    for launch, i in zip(launcher.launches[:3], (7, 10, 8), strict=True):
        partial = launch.tensors[i]
        assert partial is not None
        assert len(partial) > 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_depthwise_matches_float64_autograd(case: Case, host: HostLauncher) -> None:
    check_depthwise(case, host)


@pytest.mark.parametrize(
    "case",
    [Case(3, 90, 7, 9), Case(2, 64, 9, 33, dtype=BFLOAT), Case(2, 7, 5, 5, dtype=HALF)],
    ids=str,
)
def test_batch_norm_matches_float64_formulas(case: Case, host: HostLauncher) -> None:
    check_batch_norm(case, host)


def test_moments_match_autograd(host: HostLauncher) -> None:
    check_moments(host)


def test_running_statistics_match_the_formula(host: HostLauncher) -> None:
    check_track(host)


def test_any_block_may_be_the_last(host: HostLauncher) -> None:
    check_last_block(host)


def test_sums_are_launches_of_no_other_kernel(host: HostLauncher) -> None:
    """One launch each, and one for a backward pass; a large kernel's takes two."""
    p = make_problem(WALKED)
    kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, host)
    kernels.depthwise_backward(p.dy, p.x, p.weight, 1, p.bn, launcher=host)
    kernels.bn_backward(p.x, p.x, p.bn, True, host)
    kernels.channel_sums(p.x, host)
    names = [launch.kernel for launch in host.launches]
    assert names == ["depthwise_forward", "depthwise_backward", "bn_swish", "bn_swish"]
    kernels.depthwise_backward(p.dy, p.x, torch.ones(70, 1, 7, 7), 1, p.bn, launcher=host)
    assert [launch.kernel for launch in host.launches[4:]] == ["depthwise_backward"] * 2


def test_order_of_threads_does_not_change_a_bit(host_folder: Path) -> None:
    """A race that the barriers leave open would show as a difference between the two orders."""
    case = Case(2, 90, 9, 10, dtype=BFLOAT)
    p = make_problem(case)
    results = []
    for descending in (False, True):
        host = HostLauncher(host_folder, descending=descending)
        forward = kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, host)
        backward = kernels.depthwise_backward(
            p.dy, p.x, p.weight, 1, p.bn, (p.y.to(BFLOAT), p.dsums), launcher=host
        )
        results.append([*forward, *backward])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_number_of_multiprocessors_only_regroups_sums(host_folder: Path) -> None:
    """Few multiprocessors make a block walk over many units; the result stays."""
    case = Case(4, 64, 12, 12)
    rows = []
    for multiprocessors in (1, 132):
        host = HostLauncher(host_folder, limits=replace(H100, multiprocessors=multiprocessors))
        check_depthwise(case, host)
        (launch,) = (x for x in host.launches if x.kernel == "depthwise_backward")
        partial = launch.tensors[10]
        assert partial is not None
        rows.append(partial.shape[0])
    assert rows[0] < rows[1]


def test_nchw_input_and_gradient_are_converted(host: HostLauncher) -> None:
    """Gradients may arrive in another memory format than the input."""
    case = Case(2, 24, 6, 7, fused=False)
    p = make_problem(case)
    y, _ = kernels.depthwise_forward(p.x.contiguous(), p.weight, 1, launcher=host)
    dx, dw, _ = kernels.depthwise_backward(
        p.dy.contiguous(), p.x.contiguous(), p.weight, 1, launcher=host
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, p.y) < 1e-5
    assert relative_error(dx, p.dx) < 1e-5
    assert relative_error(dw, p.dweight) < 1e-5


def test_misaligned_storage_takes_narrow_loads(host: HostLauncher) -> None:
    """A view that starts off a 16-byte boundary must not be read in 16-byte pieces."""
    case = Case(1, 64, 5, 5, fused=False)
    p = make_problem(case)
    backing = torch.zeros(p.x.numel() + 1)
    view = backing[1:].view(1, 5, 5, 64).permute(0, 3, 1, 2)
    view.copy_(p.x)
    y, _ = kernels.depthwise_forward(view, p.weight, 1, launcher=host)
    assert relative_error(y, p.y) < 1e-5
    assert dict(host.launches[-1].macros)["VIO"] == 1


def test_only_what_is_needed_is_computed(host: HostLauncher) -> None:
    case = Case(2, 24, 6, 7, fused=False)
    p = make_problem(case)
    dx, dw, _ = kernels.depthwise_backward(p.dy, p.x, p.weight, 1, need_dx=False, launcher=host)
    assert dx.numel() == 0
    assert relative_error(dw, p.dweight) < 1e-5
    dx, dw, _ = kernels.depthwise_backward(p.dy, p.x, p.weight, 1, need_dw=False, launcher=host)
    assert dw.numel() == 0
    assert relative_error(dx, p.dx) < 1e-5


SANITIZED = [
    Case(3, 90, 7, 9, dtype=BFLOAT),
    Case(5, 24, 4, 4, dtype=BFLOAT),
    Case(1, 7, 3, 5, k=3, dtype=HALF),
    Case(1, 33, 17, 9, s=2),
    Case(1, 6, 9, 6, k=7, fused=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SANITIZED, ids=str)
def test_clean_under_sanitizers(case: Case, host_folder: Path) -> None:
    """No access outside a tensor or shared memory, misaligned access or signed overflow."""
    host = HostLauncher(host_folder, sanitize=True)
    check_depthwise(case, host)
    if case.k == 5 and case.s == 1:
        check_batch_norm(replace(case, w=case.w + 30), host)


@pytest.mark.slow
def test_vectors_clean_under_sanitizers(host_folder: Path) -> None:
    check_moments(HostLauncher(host_folder, sanitize=True))
