"""The path through the registered ops (autograd, compile, autocast, synchronization), on the CPU.

There the ops compute their formulas; that the kernels compute the same is test_host_kernels.py's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nvae.ops import (
    Statistics,
    Tracked,
    batch_norm,
    bn_swish,
    bn_swish_depthwise,
    depthwise_conv2d,
    library,
)

EPS = 1e-5
Chain = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def ops_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``impl="cuda"`` takes the registered ops, whatever the device."""
    monkeypatch.setattr(library, "use_kernel", _insists)


def _insists(impl: str, *_: object) -> bool:
    return impl == "cuda"


def inputs(
    dtype: torch.dtype = torch.float64, c: int = 5, k: int = 3, size: tuple[int, int] = (6, 5)
) -> list[Tensor]:
    """x, gamma1, beta1, weight, gamma2, beta2."""
    gen = torch.Generator().manual_seed(0)
    shapes = [(3, c, *size), (c,), (c,), (c, 1, k, k), (c,), (c,)]
    tensors = [torch.randn(*s, generator=gen, dtype=dtype) for s in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in tensors]


def running(c: int = 5) -> Statistics:
    gen = torch.Generator().manual_seed(3)
    return Statistics(torch.randn(c, generator=gen), 0.5 + torch.rand(c, generator=gen))


def fused_chain(stride: int, stats: Statistics | None = None, group: object = None) -> Chain:
    def chain(
        x: Tensor, g1: Tensor, b1: Tensor, w: Tensor, g2: Tensor, b2: Tensor
    ) -> tuple[Tensor, ...]:
        first, second = tracked(x), tracked(x)
        h = bn_swish_depthwise(
            x, g1, b1, w, stride, moments=stats, tracked=first, tracked_next=second, group=group,
            impl="cuda",
        )  # fmt: skip
        assert (h.moments is None) == (stats is not None)
        known = stats if h.moments is None else h.moments
        z = bn_swish(h.output, g2, b2, moments=known, tracked=second, group=group, impl="cuda")
        return z, *first[:2], *second[:2]

    return chain


def tracked(like: Tensor) -> Tracked:
    """Running statistics from zero."""
    mean, var = torch.zeros(2, like.shape[1], dtype=torch.promote_types(like.dtype, torch.float32))
    return Tracked(mean, var, momentum=0.5, repeats=2)


def reference_chain(stride: int, stats: Statistics | None = None, group: object = None) -> Chain:
    def chain(
        x: Tensor, g1: Tensor, b1: Tensor, w: Tensor, g2: Tensor, b2: Tensor
    ) -> tuple[Tensor, ...]:
        first, second = tracked(x), tracked(x)
        given = {"moments": stats, "group": group, "impl": "reference"}
        h = bn_swish_depthwise(x, g1, b1, w, stride, tracked=first, tracked_next=second, **given)
        assert h.moments is None
        z = bn_swish(h.output, g2, b2, tracked=second, **given)
        return z, *first[:2], *second[:2]

    return chain


def gradients(chain: Chain, args: list[Tensor]) -> list[Tensor]:
    y = chain(*args)[0]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return list(torch.autograd.grad((y * dy).sum(), args))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("evaluation", [False, True])
def test_chain_agrees_with_the_reference(stride: int, evaluation: bool) -> None:
    """Outputs, statistics and every gradient, to float64 rounding."""
    args = inputs()
    stats = Statistics(*(t.double() for t in running()[:2])) if evaluation else None
    fused, reference = fused_chain(stride, stats), reference_chain(stride, stats)
    torch.testing.assert_close(fused(*args), reference(*args), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        gradients(fused, args), gradients(reference, args), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("make", [fused_chain, reference_chain])
@pytest.mark.parametrize("stride", [1, 2])
def test_chain_passes_gradcheck(make: Callable[[int], Chain], stride: int) -> None:
    assert torch.autograd.gradcheck(lambda *args: make(stride)(*args)[0], inputs(c=2, size=(3, 3)))


def test_depthwise_passes_gradcheck() -> None:
    x, _, _, w, _, _ = inputs(c=2, k=5, size=(3, 4))
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w, 2, impl="cuda"), (x, w))
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w, 1), (x, w))


def test_bn_swish_alone_takes_its_own_sums() -> None:
    """Gradients through the batch statistics arrive without a depthwise op in front."""
    x, gamma, beta, *_ = inputs(c=2, size=(3, 3))
    assert torch.autograd.gradcheck(
        lambda *a: bn_swish(*a, impl="cuda"),
        (x, gamma, beta),
    )


def test_sums_of_the_output_are_differentiable() -> None:
    """A loss on the sums alone reaches every input."""
    args = inputs(c=2, size=(3, 3))[:4]

    def sums(*args: Tensor) -> Tensor:
        h = bn_swish_depthwise(*args, impl="cuda")
        assert h.moments is not None
        assert h.moments.sums is not None
        return h.moments.sums

    assert torch.autograd.gradcheck(sums, args)


def test_only_the_raw_input_is_kept() -> None:
    """The paper's memory saving: nothing of the input's size but the raw tensors themselves."""
    args = inputs(torch.float32, c=8)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_chain(1)(*args)
    large = [n for n in kept.values() if n >= args[0].numel()]
    assert len(large) == 2  # x, and y, the raw input of the second layer


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (fused_chain, "aot_eager"),
        (reference_chain, "aot_eager"),
        pytest.param(fused_chain, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_graph_breaks(make: Callable[[int], Chain], backend: str) -> None:
    args = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(make(1), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*args), make(1)(*args), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(compiled, args), gradients(make(1), args), rtol=1e-10, atol=1e-12
    )


def test_public_ops_compile_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the choice of the implementation as it is."""
    monkeypatch.undo()
    x, gamma, beta, w, *_ = inputs(torch.float32)

    def ops(x: Tensor, gamma: Tensor, beta: Tensor, w: Tensor) -> Tensor:
        h = bn_swish_depthwise(x, gamma, beta, w)
        return depthwise_conv2d(bn_swish(h.output, gamma, beta, moments=h.moments), w, 2)

    torch._dynamo.reset()
    compiled = torch.compile(ops, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, gamma, beta, w), ops(x, gamma, beta, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    """Storage in 16 bits, statistics and parameters wider."""
    args = inputs(torch.float32)
    x = args[0].detach().to(dtype).requires_grad_()
    y = fused_chain(1)(x, *args[1:])[0]
    assert y.dtype == dtype
    want = reference_chain(1)(*args)[0]
    assert float((y.float() - want).detach().abs().max()) < 0.05 * float(want.detach().abs().max())
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in args[1:])


@pytest.mark.parametrize("op", ["plain", "fused"])
def test_autocast_ops_have_their_fakes_types(op: str) -> None:
    """Inside autocast the registered ops compute in the types they were given."""
    x, gamma, beta, w, *_ = (t.detach() for t in inputs(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        if op == "plain":
            assert torch.ops.nvae.depthwise(x, w, 1).dtype == torch.float32
            assert depthwise_conv2d(x, w).dtype == torch.bfloat16
        else:
            h = bn_swish_depthwise(x.bfloat16(), gamma, beta, w, impl="cuda")
            assert h.output.dtype == torch.bfloat16


def opcheck_inputs() -> dict[str, tuple[object, ...]]:
    x, gamma, beta, w, *_ = (t.detach() for t in inputs(torch.float32))
    moments = torch.ones(3, 5, dtype=torch.float64)
    bn, sums = (gamma, beta, moments), torch.ops.nvae.channel_sums(x)
    tracking = (EPS, torch.zeros(5), torch.ones(5), 1.0, 0.1)
    untracked = (EPS, None, None, 1.0, 0.0)
    n = torch.tensor(90.0, dtype=torch.float64)
    return {
        "channel_sums": (x,),
        "fold": (x, x, sums),
        "moments": (sums, n, 90.0, *tracking),
        "channel_moments": (x, *tracking),
        "channel_moments, untracked": (x, *untracked),
        "batch_norm": (x, *bn, True),
        "batch_norm_backward": (x, x, *bn, False, n, 1.0),
        "batch_norm_backward, constants": (x, x, *bn, True, None, 0.0),
        "depthwise": (x, w, 2),
        "depthwise_backward": (x, x, w, 1, True, False),
        "bn_swish_depthwise": (x, *bn, w, 1, True),
        "bn_swish_depthwise_moments": (x, *bn, w, 2, *tracking),
        "bn_swish_depthwise_moments, untracked": (x, *bn, w, 1, *untracked),
        "bn_swish_depthwise_backward": (x, x, sums, x, *bn, w, 1, None, 90.0),
    }


@pytest.mark.parametrize("name", opcheck_inputs())
def test_opcheck(name: str) -> None:
    """Schema, fake against real, tracing with dynamic shapes."""
    op = getattr(torch.ops.nvae, name.partition(",")[0])
    torch.library.opcheck(op.default, opcheck_inputs()[name])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone: the path of several ranks."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [batch_norm, bn_swish])
def test_ranks_keep_nothing_but_the_raw_input(
    norm: Callable[..., Tensor], dtype: torch.dtype, group: dist.ProcessGroup
) -> None:
    """Statistics that ranks share cost 2C + 1 numbers, not tensors of the input's size."""
    x, gamma, beta, *_ = inputs(torch.float32, c=8)
    x = x.detach().to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm(x, gamma, beta, group=group)
    images = x.numel() * x.element_size()
    swished = norm is bn_swish  # the CPU's Swish is not of the same op, and keeps its input
    assert sum(n for n in kept.values() if n >= images) == images * (1 + swished)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shared_statistics_pass_gradcheck(
    batch: int, layout: torch.memory_format, group: dist.ProcessGroup
) -> None:
    """In either memory format, that of the gradient being another or not."""
    x, gamma, beta, *_ = inputs(c=2, size=(2, 3))
    x = x.detach()[:batch].contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: batch_norm(*a, group=group), (x, gamma, beta))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    alone, shared = (
        torch.autograd.grad((batch_norm(x, gamma, beta, group=g) * dy).sum(), [x, beta])
        for g in (None, group)
    )
    torch.testing.assert_close(shared, alone, rtol=1e-10, atol=1e-12)


def test_shared_statistics_compile_without_graph_breaks(group: dist.ProcessGroup) -> None:
    """In a group that is not the default one, as layers have it."""
    own = dist.new_group([0])

    def norms(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = batch_norm(x, gamma, beta, group=own)
        return bn_swish(y, gamma, beta, group=own)

    args = inputs()[:3]
    torch._dynamo.reset()
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), norms(*args))
    found, want = (torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, norms))
    torch.testing.assert_close(found, want)


def _rank(rank: int, folder: str) -> None:
    """Two ranks with uneven batches run both paths' chains."""
    torch.set_num_threads(1)
    library.use_kernel = _insists
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for make in (fused_chain, reference_chain):
        x, *rest = inputs()
        mine = slice(0, 2) if rank == 0 else slice(2, 3)
        part = x.detach()[mine].requires_grad_()
        y, *statistics = make(1, group=dist.group.WORLD)(part, *rest)
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(y)
        grads = torch.autograd.grad((y * dy[mine]).sum(), [part, *rest])
        results.append([y.detach(), *statistics, *grads])
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_synchronized_statistics_equal_one_large_batch(tmp_path: Path) -> None:
    """As SyncBatchNorm, with an uneven batch: outputs, statistics, and gradients summed."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    args = inputs()
    want = [t.detach() for t in reference_chain(1)(*args)]
    grads = gradients(reference_chain(1), args)
    close = {"rtol": 1e-10, "atol": 1e-12}
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        torch.testing.assert_close(torch.cat([first[0], second[0]]), want[0], **close)
        for i in range(1, 5):
            torch.testing.assert_close(first[i], want[i], **close)
            torch.testing.assert_close(second[i], want[i], **close)
        torch.testing.assert_close(torch.cat([first[5], second[5]]), grads[0], **close)
        for i in range(6, 11):
            torch.testing.assert_close(first[i] + second[i], grads[i - 5], **close)
