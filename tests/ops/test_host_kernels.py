"""The CUDA kernels' unchanged source, run on the CPU (host_shim.h), against float64 autograd."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvae.ops import kernels, reference
from nvae.ops.cuda import CompileError

from .cases import ELEMENTS, EPS, Case, make_problem, moments_of, relative_error, tolerance
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

    y, sums, _ = kernels.depthwise_forward(p.x, p.weight, case.s, bn, case.fused, launcher=launcher)
    assert y.dtype == case.dtype
    assert relative_error(y, p.y) < close
    if case.fused:  # sums are those of the stored tensor, not of the values before rounding
        assert relative_error(sums, reference.channel_sums(y)) < 1e-5

    through = (p.y.to(case.dtype), p.dsums) if case.fused else None
    dx, dw, params, dsums = kernels.depthwise_backward(
        p.dy, p.x, p.weight, case.s, bn, through, elements=(None, ELEMENTS), launcher=launcher
    )
    assert dx.dtype == case.dtype
    assert relative_error(dx, p.dx) < close
    assert relative_error(dw, p.dweight) < close
    if case.fused:
        assert relative_error(params, p.dparams) < close
        assert relative_error(dsums, p.through) < close


def check_batch_norm(case: Case, launcher: HostLauncher) -> None:
    """The element-wise passes of one case against their formulas in float64."""
    p = make_problem(case)
    close = tolerance(case.dtype)
    wide, bn = p.x.double(), tuple(t.double() for t in p.bn)
    dy = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)

    for swish in (False, True):
        y = kernels.bn_forward(p.x, p.bn, swish, launcher)
        assert relative_error(y, reference.bn_forward(wide, *bn, swish=swish)) < close
        dx64, sums64 = reference.bn_backward(dy.double(), wide, *bn, swish=swish)
        for elements in (None, torch.tensor(ELEMENTS, dtype=torch.float64)):
            n = ELEMENTS if elements is None else 1.0  # the device's number wins
            dx, *gradients = kernels.bn_backward(dy, p.x, p.bn, swish, (elements, n), launcher)
            assert relative_error(dx, dx64) < close
            wanted = reference.bn_gradients(sums64, bn[0], bn[2], elements, n)
            for found, want in zip(gradients, wanted, strict=True):
                assert relative_error(found, want) < 1e-5
    assert relative_error(kernels.channel_sums(p.x, launcher), reference.channel_sums(wide)) < 1e-5
    folded = kernels.fold(dy, p.x, p.dsums, launcher)
    assert relative_error(folded, reference.fold(dy.double(), wide, p.dsums)) < close


def running_pair(c: int) -> list[torch.Tensor]:
    """A running mean and variance, always the same."""
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(c, generator=gen), 0.5 + torch.rand(c, generator=gen)]


def check_moments(launcher: HostLauncher) -> None:
    """The statistics' vectors, and what moves towards them, against the formula; the number of
    elements from host and device."""
    gen = torch.Generator().manual_seed(0)
    n, c, repeats, momentum = 50, 300, 4.0, 0.05
    x = torch.randn(n, c, generator=gen, dtype=torch.float64) + 3
    sums = torch.stack([x.sum(0), x.square().sum(0)])
    sums[1, 7] = sums[0, 7] ** 2 / n - 1e-9  # rounding put the variance below zero
    want = moments_of(sums, n)
    theirs = running_pair(c)
    reference.track(*theirs, want[0], want[2], None, n, repeats, momentum)
    for elements in (None, torch.tensor(float(n), dtype=torch.float64)):
        count = n if elements is None else 0  # the device's number wins
        ours = running_pair(c)
        versions = [t._version for t in ours]
        got = kernels.moments(sums, elements, count, (EPS, *ours, repeats, momentum), launcher)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert all(t._version > v for t, v in zip(ours, versions, strict=True))
        alone = kernels.moments(sums, elements, count, (EPS, None, None, 1.0, 0.0), launcher)
        assert torch.equal(alone, got)


def check_moments_of_the_last_block(launcher: HostLauncher) -> None:
    """What follows from the sums in the kernels that take them, at two launches one after the
    other: moments, and running statistics that move once each, or not at all."""
    launcher.pretended = replace(SMALL, multiprocessors=8)  # more rows of partial sums
    repeats, momentum = 4.0, 0.05
    for case in (WALKED, Case(2, 7, 5, 5, dtype=HALF)):
        p = make_problem(case)
        y, c = p.x, case.c
        for normalized in (False, True):
            ours, theirs = running_pair(c), running_pair(c)
            versions = [t._version for t in ours]
            for _ in range(2):
                tracking = (EPS, *ours, repeats, momentum)
                if normalized:
                    y, sums, found = kernels.depthwise_forward(
                        p.x, p.weight, 1, p.bn, True, tracking, launcher
                    )
                else:
                    sums, found = kernels.channel_moments(p.x, tracking, launcher)
                n = y.numel() // c
                assert relative_error(sums, reference.channel_sums(y.double())) < 1e-5
                want = moments_of(sums, n)
                torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
                reference.track(*theirs, want[0], want[2], None, n, repeats, momentum)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            assert all(t._version > v for t, v in zip(ours, versions, strict=True))
            untracked = (EPS, None, None, 1.0, 0.0)
            alone = (
                kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, untracked, launcher)[2]
                if normalized
                else kernels.channel_moments(p.x, untracked, launcher)[1]
            )
            assert torch.equal(alone, found)


def check_strided_moments(launcher: HostLauncher) -> None:
    """Of a convolution that halves the resolution: its output's elements count."""
    case = Case(2, 16, 9, 12, s=2)
    p = make_problem(case)
    tracking = (EPS, *running_pair(16), 1.0, 0.1)
    _, _, found = kernels.depthwise_forward(p.x, p.weight, 2, p.bn, True, tracking, launcher)
    want = moments_of(p.sums, p.y.numel() // 16)
    assert relative_error(found, want) < 1e-5


def check_gradients_of_the_last_block(launcher: HostLauncher) -> None:
    """A channel whose variance was clamped at 0 passes no gradient to it, and moments that are
    constants pass none at all."""
    p = make_problem(WALKED)
    gamma, beta, moments = p.bn
    moments = moments.clone()
    moments[1:, 3] = torch.tensor([EPS**-0.5, 0.0])
    bn = (gamma, beta, moments)
    _, params, through = kernels.bn_backward(p.dy, p.x, bn, True, (None, ELEMENTS), launcher)
    _, sums = reference.bn_backward(
        p.dy.double(), p.x.double(), *(t.double() for t in bn), swish=True
    )
    wanted = reference.bn_gradients(sums, gamma.double(), moments, None, ELEMENTS)
    for channels in (slice(3, 4), slice(0, 3), slice(4, None)):  # the one is larger by far
        for found, want in zip((params, through), wanted, strict=True):
            assert relative_error(found[:, channels], want[:, channels]) < 1e-4
    assert through[1, 3] == 0
    assert torch.count_nonzero(through[0]) == len(gamma)
    constant = kernels.bn_backward(p.dy, p.x, bn, True, launcher=launcher)
    assert torch.equal(constant[1], params)
    assert constant[2].numel() == 0


def check_last_block(launcher: HostLauncher) -> None:
    """Sums by whichever block is last are correct, also at a kernel's next launch, and have
    the same bits in any order of the blocks, of which the launcher takes another every time."""
    launcher.pretended = replace(SMALL, multiprocessors=8)  # more rows of partial sums
    p = make_problem(WALKED)
    runs = []
    for _ in range(4):
        forward = kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, launcher=launcher)
        backward = kernels.depthwise_backward(p.dy, p.x, p.weight, 1, p.bn, launcher=launcher)
        sums = kernels.channel_sums(p.x, launcher)
        runs.append([*forward, *backward, sums])
        assert relative_error(forward[1], p.sums) < 1e-5
        assert relative_error(sums, reference.channel_sums(p.x.double())) < 1e-5
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    for launch, i in zip(launcher.launches[:3], (6, 9, 7), strict=True):
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


def test_moments_match_their_formula(host: HostLauncher) -> None:
    check_moments(host)


def test_the_last_block_makes_moments_and_moves_running_statistics(host: HostLauncher) -> None:
    check_moments_of_the_last_block(host)


def test_moments_count_the_outputs_of_a_strided_convolution(host: HostLauncher) -> None:
    check_strided_moments(host)


def test_the_last_block_makes_the_gradients_of_what_normalizes(host: HostLauncher) -> None:
    check_gradients_of_the_last_block(host)


def test_running_statistics_of_another_type_are_refused(host: HostLauncher) -> None:
    """Read as float32 they would be garbage; the formula takes over."""
    p = make_problem(Case(2, 8, 3, 3))
    running = [t.double() for t in running_pair(8)]
    with pytest.raises(CompileError, match="running statistics"):
        kernels.channel_moments(p.x, (EPS, *running, 1.0, 0.1), host)
    assert not host.launches


def test_any_block_may_be_the_last(host: HostLauncher) -> None:
    check_last_block(host)


def test_sums_are_launches_of_no_other_kernel(host: HostLauncher) -> None:
    """One launch each, and one for a backward pass; a large kernel's takes two."""
    p = make_problem(WALKED)
    kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, launcher=host)
    kernels.depthwise_backward(p.dy, p.x, p.weight, 1, p.bn, launcher=host)
    kernels.bn_backward(p.x, p.x, p.bn, True, launcher=host)
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
        forward = kernels.depthwise_forward(p.x, p.weight, 1, p.bn, True, launcher=host)
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
        partial = launch.tensors[9]
        assert partial is not None
        rows.append(partial.shape[0])
    assert rows[0] < rows[1]


def test_nchw_input_and_gradient_are_converted(host: HostLauncher) -> None:
    """Gradients may arrive in another memory format than the input."""
    case = Case(2, 24, 6, 7, fused=False)
    p = make_problem(case)
    y, _, _ = kernels.depthwise_forward(p.x.contiguous(), p.weight, 1, launcher=host)
    dx, dw, *_ = kernels.depthwise_backward(
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
    y, _, _ = kernels.depthwise_forward(view, p.weight, 1, launcher=host)
    assert relative_error(y, p.y) < 1e-5
    assert dict(host.launches[-1].macros)["VIO"] == 1


def test_only_what_is_needed_is_computed(host: HostLauncher) -> None:
    case = Case(2, 24, 6, 7, fused=False)
    p = make_problem(case)
    dx, dw, *_ = kernels.depthwise_backward(p.dy, p.x, p.weight, 1, need_dx=False, launcher=host)
    assert dx.numel() == 0
    assert relative_error(dw, p.dweight) < 1e-5
    dx, dw, *_ = kernels.depthwise_backward(p.dy, p.x, p.weight, 1, need_dw=False, launcher=host)
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
    host = HostLauncher(host_folder, sanitize=True)
    check_moments(host)
    check_moments_of_the_last_block(host)
