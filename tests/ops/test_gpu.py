"""The kernels on a GPU: correctness, layouts, determinism, compile, CUDA graphs, autocast, size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nvae.ops import Statistics, Tracked, batch_norm, bn_swish, bn_swish_depthwise, depthwise_conv2d
from nvae.ops.adamax import adamax_formula
from nvae.ops.cuda import CudaLauncher
from nvae.ops.library import check_kernels
from nvae.ops.probe import find_fault

from .cases import Case, make_problem, relative_error, tolerance
from .test_adamax_kernel import SETTINGS, moving_averages
from .test_adamax_kernel import problem as adamax_problem
from .test_host_kernels import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BFLOAT = torch.bfloat16
GPU = torch.device("cuda", 0)
MAIN = [
    Case(32, 1536, 16, 16, dtype=BFLOAT),
    Case(4, 360, 64, 64, dtype=BFLOAT),
    Case(4, 90, 128, 128, dtype=BFLOAT),
    Case(200, 1536, 4, 4, dtype=BFLOAT),
    Case(16, 120, 32, 32, s=2),
    Case(8, 64, 33, 31, k=11),
]


def test_probe_finds_nothing_wrong() -> None:
    assert find_fault(GPU) is None
    check_kernels("cuda", GPU)


def test_reference_launches_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(CudaLauncher, "launch", refuse)
    x = torch.randn(2, 8, 6, 6, device="cuda").contiguous(memory_format=torch.channels_last)
    v, w = torch.ones(8, device="cuda"), torch.randn(8, 1, 3, 3, device="cuda")
    bn_swish_depthwise(x, v, v, w, impl="reference")
    with pytest.raises(AssertionError, match="launched"):
        bn_swish_depthwise(x, v, v, w)


def chain(x: Tensor, *params: Tensor, stride: int = 1, impl: str = "cuda") -> Tensor:
    """BN + Swish -> depthwise -> BN + Swish with batch statistics."""
    gamma1, beta1, weight, gamma2, beta2 = params
    h = bn_swish_depthwise(x, gamma1, beta1, weight, stride, impl=impl)  # type: ignore[arg-type]
    return bn_swish(h.output, gamma2, beta2, moments=h.moments, impl=impl)  # type: ignore[arg-type]


def chain_inputs(case: Case, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device="cuda")

    x = normal(case.b, case.c, case.h, case.w).to(case.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    params = [
        normal(case.c).abs() + 0.5, normal(case.c) / 2, normal(case.c, 1, case.k, case.k) / case.k,
        normal(case.c).abs() + 0.5, normal(case.c) / 2,
    ]  # fmt: skip
    return [t.requires_grad_() for t in (x, *params)]


def run(function: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    """Output and gradients, the gradient of the output in the other memory format."""
    y = function(*args)
    gen = torch.Generator("cuda").manual_seed(5)
    dy = torch.randn(y.shape, generator=gen, device="cuda").to(y.dtype).contiguous()
    return [y.detach(), *torch.autograd.grad(y, args, dy)]


@pytest.mark.parametrize("case", [*CASES, *MAIN], ids=str)
def test_depthwise_against_float64(case: Case) -> None:
    """Outputs and gradients of the plain convolution."""
    p = make_problem(Case(**{**case.__dict__, "fused": False}))
    x = p.x.cuda().requires_grad_()
    w = p.weight.cuda().requires_grad_()
    y = depthwise_conv2d(x, w, case.s, impl="cuda")
    dx, dw = torch.autograd.grad(y, (x, w), p.dy.cuda())
    close = tolerance(case.dtype)
    for got, want in ((y, p.y), (dx, p.dx), (dw, p.dweight)):
        assert relative_error(got.cpu(), want) < close


@pytest.mark.parametrize("case", [*CASES[:-1], *MAIN], ids=str)
def test_chain_against_the_reference_in_float64(case: Case) -> None:
    args = chain_inputs(case)
    wide = [a.detach().double().requires_grad_() for a in args]
    got = run(lambda *a: chain(*a, stride=case.s), args)
    want = run(lambda *a: chain(*a, stride=case.s, impl="reference"), wide)
    close = 5 * tolerance(case.dtype)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < close


@pytest.mark.parametrize("case", [Case(4, 90, 9, 9), Case(8, 64, 16, 16, dtype=BFLOAT)], ids=str)
def test_shared_statistics_against_float64(case: Case, tmp_path: Path) -> None:
    """The path of several ranks, in a group of one."""
    args = chain_inputs(case)[:3]
    wide = [a.detach().double().requires_grad_() for a in args]
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        got = run(lambda *a: batch_norm(*a, group=dist.group.WORLD), args)
    finally:
        dist.destroy_process_group()
    want = run(lambda *a: batch_norm(*a), wide)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 5 * tolerance(case.dtype)


def test_evaluation_uses_running_statistics() -> None:
    x, gamma, beta, w, *_ = chain_inputs(Case(4, 90, 9, 9))
    running = Statistics(torch.randn(90, device="cuda"), torch.rand(90, device="cuda") + 0.5)
    got = bn_swish_depthwise(x, gamma, beta, w, moments=running, impl="cuda").output
    want = bn_swish_depthwise(x, gamma, beta, w, moments=running, impl="reference").output
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_running_statistics_move_as_by_the_formula() -> None:
    """In two steps, those of the layer in front of the convolution and of the one behind it."""
    x, gamma, beta, w, *_ = (t.detach() for t in chain_inputs(Case(4, 90, 9, 9, dtype=BFLOAT)))
    moved = {}
    for impl in ("cuda", "reference"):
        first, second = (
            Tracked(torch.zeros(90, device="cuda"), torch.ones(90, device="cuda"), 0.1, repeats)
            for repeats in (4, 1)
        )
        for _ in range(2):
            h = bn_swish_depthwise(
                x,
                gamma,
                beta,
                w,
                tracked=first,
                tracked_next=second,
                impl=impl,  # type: ignore[arg-type]
            )
            bn_swish(h.output, gamma, beta, moments=h.moments, tracked=second, impl=impl)  # type: ignore[arg-type]
        moved[impl] = [*first[:2], *second[:2]]
    torch.testing.assert_close(moved["cuda"], moved["reference"], rtol=2e-2, atol=1e-2)


def test_weight_gradient_is_deterministic() -> None:
    args = chain_inputs(Case(32, 256, 16, 16, dtype=BFLOAT))
    first, second = run(chain, args), run(chain, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nchw_input_works() -> None:
    x, _, _, w, *_ = chain_inputs(Case(4, 24, 9, 9))
    nchw = x.detach().contiguous().requires_grad_()
    torch.testing.assert_close(
        depthwise_conv2d(nchw, w, impl="auto"), depthwise_conv2d(x, w, impl="cuda"),
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_compiles_without_graph_breaks() -> None:
    args = chain_inputs(Case(4, 64, 16, 16))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: chain(*a, impl="auto"), fullgraph=True)
    for a, b in zip(run(compiled, args), run(chain, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_convolves_in_its_type() -> None:
    args = chain_inputs(Case(4, 64, 16, 16))
    with torch.autocast("cuda", BFLOAT):
        assert depthwise_conv2d(args[0], args[3], impl="cuda").dtype == BFLOAT
        y = chain(*args)
    assert y.dtype == BFLOAT
    y.float().sum().backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in args)


def test_cuda_graph_replays_forward_and_backward() -> None:
    args = chain_inputs(Case(8, 64, 16, 16, dtype=BFLOAT))
    other = chain_inputs(Case(8, 64, 16, 16, dtype=BFLOAT), seed=1)
    dy = torch.ones_like(chain(*args))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(chain(*args), args, dy)  # loads the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(*args)
        grads = torch.autograd.grad(y, args, dy)
    with torch.no_grad():
        for a, b in zip(args, other, strict=True):
            a.copy_(b)
    graph.replay()
    want = chain(*other)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want, other, dy))


def test_launches_on_the_current_stream() -> None:
    """Work queued on a side stream in front of the kernel is seen by it."""
    x, _, _, w, *_ = (t.detach() for t in chain_inputs(Case(4, 64, 16, 16)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x.clone()
        y = depthwise_conv2d(late, w, impl="cuda")
    stream.synchronize()
    torch.testing.assert_close(y, depthwise_conv2d(x, w, impl="reference"), rtol=1e-3, atol=1e-3)


def test_less_memory_than_the_reference() -> None:
    """Only the two raw inputs are kept for the backward pass."""
    args = chain_inputs(Case(32, 512, 32, 32, dtype=BFLOAT))

    def held(impl: str) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = chain(*args, impl=impl)
        after = torch.cuda.memory_allocated()
        assert y.requires_grad
        return after - before

    assert held("cuda") < 0.6 * held("reference")


@pytest.mark.slow
def test_tensor_of_more_than_two_to_the_31_elements() -> None:
    """64-bit offsets: the last image and channel, forward and backward."""
    b, c, h, w = 36, 960, 256, 256  # 2.26e9 elements, 4.5 GB
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    x = torch.zeros(b, h, w, c, dtype=BFLOAT, device="cuda").permute(0, 3, 1, 2)
    x[-1] = torch.randn(c, h, w, device="cuda").to(BFLOAT)
    x.requires_grad_()
    weight = torch.randn(c, 1, 5, 5, device="cuda", requires_grad=True)
    y = depthwise_conv2d(x, weight, impl="cuda")
    dy = torch.zeros_like(y)
    dy[-1] = 1
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    last = x.detach()[-1:].float().requires_grad_()
    want = depthwise_conv2d(last, weight, impl="reference")
    want_dx, want_dw = torch.autograd.grad(want, (last, weight), torch.ones_like(want))
    assert relative_error(y[-1:], want) < 1e-2
    assert relative_error(dx[-1:], want_dx) < 1e-2
    assert relative_error(dw, want_dw) < 1e-2
    assert not y[0].any()
    assert not dx[0].any()


def test_adamax_in_one_pass_against_the_formula() -> None:
    """Twenty steps, some left out, through the registered op, beside the formula in float64; a
    moving average goes along."""
    lists, step, rate = (
        [[t.cuda() for t in each] for each in part] if isinstance(part, list) else part.cuda()
        for part in adamax_problem()
    )
    share = torch.tensor(0.25, dtype=torch.float64, device="cuda")
    moving = [t.cuda() for t in moving_averages(adamax_problem()[0])]
    wide, wide_step = [[t.double() for t in each] for each in lists], step.clone()
    wide_moving = [t.double() for t in moving]
    for number in range(20):
        switch = torch.tensor(float(number % 5 == 3), device="cuda")
        gradients = [g.clone() for g in wide[1]]
        adamax_formula(
            wide[0], gradients, *wide[2:], wide_step, rate, switch, *SETTINGS, wide_moving, share
        )
        torch.ops.nvae.adamax_(*lists, step, rate, switch, *SETTINGS, moving, share)
    assert step == wide_step == 16
    got = [*lists[0], *lists[2], *lists[3], *moving]
    want = [*wide[0], *wide[2], *wide[3], *wide_moving]
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
