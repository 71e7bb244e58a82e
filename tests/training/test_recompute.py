"""Recomputing must change memory and nothing else."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nvae.models import NVAE, ModelConfig, normalization, together
from nvae.models.cells import Cell, MobileConv, MobileConvSpec
from nvae.models.layers import DataInitConv2d, WeightNormConv2d
from nvae.models.together import AT_ONCE
from nvae.objective import Objective, ObjectiveConfig
from nvae.ops import library
from nvae.ops.weight_norm import weight_norms
from nvae.regularizers import batchnorms
from nvae.training.recompute import _checkpointed, compile_blocks, recompute_segments
from tests.models.small import small_very_deep
from tests.training.ranks import run_ranks

CONFIG = ModelConfig(
    image_size=8, num_scales=2, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=2,
    postprocess_cells=2, encoder_channels=8, decoder_channels=8, latent_channels=2, num_flows=1,
)  # fmt: skip


def _step(model: NVAE, part: slice = slice(None), half: bool = False) -> tuple[torch.Tensor, int]:
    """A forward and backward pass; its loss and the bytes kept between the two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 1, 8, 8, generator=generator).round()[part]
    noise = [eps[part] for eps in model.draw_noise(4, generator)]
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective = Objective(model, ObjectiveConfig())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = objective(model, x, noise, step=15, total_steps=100, regularize=False).data
    held = sum(kept.values())
    loss.backward()
    return loss, held


def _assert_same(plain: NVAE, recomputed: NVAE) -> None:
    """Gradients, running statistics and names, to the bit."""
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad), name
    a, b = plain.state_dict(), recomputed.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert sum("running_mean" in name and bool(a[name].any()) for name in a) > 10


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_equals_plain_training_pass(half: bool) -> None:
    """Loss, gradients, running statistics and names are the same bits; less is held."""
    torch.manual_seed(0)
    plain = NVAE(CONFIG)
    recomputed = copy.deepcopy(plain)
    recompute_segments(recomputed)
    (loss_a, held_a), (loss_b, held_b) = _step(plain, half=half), _step(recomputed, half=half)
    assert torch.equal(loss_a, loss_b)
    assert held_b < 0.4 * held_a
    _assert_same(plain, recomputed)


def _both(rank: int, world: int) -> int:
    """A plain and a recomputed pass over this rank's half of a batch; how often ranks met."""
    torch.manual_seed(0)
    plain = NVAE(CONFIG)
    recomputed = copy.deepcopy(plain)
    recompute_segments(recomputed)
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    meetings = []
    for model in (plain, recomputed):
        for norm in batchnorms(model):
            norm.group = dist.group.WORLD
        with pytest.MonkeyPatch.context() as patch:
            counted = _Counted(dist.all_reduce)
            patch.setattr(dist, "all_reduce", counted)
            _step(model, part)
        meetings.append(counted.calls)
    _assert_same(plain, recomputed)
    return meetings[1] - meetings[0]


class _Counted:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **more)


def test_ranks_repeat_their_collectives_in_one_order() -> None:
    """Shared statistics are shared once more in the recomputation, and come out the same."""
    first, second = run_ranks(_both, 2)
    assert first == second > 10


def test_whole_groups_are_recomputed() -> None:
    """Heads, merges and flow of a group, not its cells alone; nothing inside something else."""
    model = NVAE(CONFIG)
    segments = model.segments()
    inside = [id(m) for segment in segments for m in segment.modules()]
    assert len(inside) == len(set(inside))
    assert {id(group) for group in model.groups} <= {id(segment) for segment in segments}
    cells = [module for module in model.modules() if isinstance(module, Cell)]
    assert {id(cell) for cell in cells} <= set(inside)


@pytest.mark.parametrize("change", [recompute_segments, partial(compile_blocks, backend="eager")])
def test_a_copy_has_its_own_weights(change: Callable[[NVAE], None]) -> None:
    """A deep copy (the weights' average) must not run the original's cells."""
    torch.manual_seed(0)
    model = NVAE(CONFIG).double()
    change(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    assert not copied(x).logits.any()
    assert model(x).logits.any()


@torch._dynamo.config.patch(optimize_ddp=True)
def test_blocks_are_compiled_whole_under_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would cut a block's graph where DDP's buckets end; older versions raise where it holds
    autograd functions, as ours do."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = NVAE(CONFIG)
    compile_blocks(model, backend)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    ddp = SimpleNamespace(bucket_bytes_cap=2**30)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", ddp)
    cell = next(block for block in model.blocks() if isinstance(block, Cell))
    channels = next(p.shape[0] for p in cell.parameters())
    cell(torch.rand(2, channels, 8, 8))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_ops_move_running_statistics_once_a_step(
    backend: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the registered ops write them beside their results, as on a GPU: also when a compiler
    has made functions of the ops, and when the backward pass calls them again."""

    def step(cell: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        y = cell(x)
        (y * y.detach().flip(0)).sum().backward()
        return [*(p.grad for p in cell.parameters() if p.grad is not None), *cell.buffers()]

    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = MobileConv(MobileConvSpec(2, 3), 4, 4, 1, False).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    other = copy.deepcopy(plain)
    if backend != "eager":
        other.forward = torch.compile(other.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
    if recomputed:
        other.forward = partial(_checkpointed, other.forward, list(other.modules()))  # type: ignore[method-assign]
    wanted = step(plain, x)
    monkeypatch.setattr(library, "use_kernel", lambda impl, *_: impl != "reference")
    found = step(other, x)
    assert len(wanted) == 11 + 12
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "family",
    ["nvae", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ("vdvae", "evdvae"))],
)
def test_compiled_blocks_keep_their_names_and_numbers(family: str) -> None:
    """Cells, heads, flows and merges; also where they are recomputed in the backward pass.

    Dynamo traces, nothing is generated.
    """
    config = ModelConfig(
        image_size=8, num_scales=1, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1,
        postprocess_cells=1, encoder_channels=4, decoder_channels=4, latent_channels=2,
        encoder_cells_per_group=1, decoder_cells_per_group=1, num_flows=1,
    )  # fmt: skip
    torch._dynamo.reset()
    torch.manual_seed(0)
    few = {"vdvae": {"encoder_blocks": "8d8", "decoder_blocks": "1,8m1"}, "evdvae": {
        "down_n_blocks_per_res": [0] * 4}}  # fmt: skip
    plain = NVAE(config) if family == "nvae" else small_very_deep(family, **few[family]).train()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="aot_eager")
    recompute_segments(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    x = torch.rand(2, 1, 8, 8).round()
    noise = plain.draw_noise(2)
    for model in (plain, compiled):
        output = model(x, noise)
        (output.logits.sum() + output.kl_per_group.sum()).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, p), q in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)
    for temperature in (1.0, 0.7):
        drawn = [m.eval().sample_logits(2, temperature, noise) for m in (plain, compiled)]
        torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive
def test_every_kind_of_block_is_compiled() -> None:
    """More kinds, widths and modes than Dynamo's default limit of graphs for one function.

    Beyond it blocks would run uncompiled, and nothing but a warning would say so; a group that
    reads a number from the device would be two graphs.
    """
    config = ModelConfig(
        image_size=16, num_scales=3, groups_per_scale=2, adaptive_groups=False,
        preprocess_blocks=1, preprocess_cells=2, postprocess_cells=2, encoder_channels=4,
        decoder_channels=4, latent_channels=2, encoder_cells_per_group=1,
        decoder_cells_per_group=1,
    )  # fmt: skip
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = NVAE(config)
    compile_blocks(model, backend="eager")
    x = torch.rand(2, 1, 16, 16).round()
    model(x)
    model.eval()
    with torch.no_grad():
        model(x)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 8
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


@pytest.mark.parametrize(
    ("recompute", "compiled"),
    [
        (False, False),
        (True, False),
        pytest.param(True, True, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
def test_weights_normalized_together_change_nothing(
    recompute: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients, and in the second pass of recomputed segments the first one's weights."""
    torch.manual_seed(0)
    apart = NVAE(CONFIG)
    joined = copy.deepcopy(apart)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(joined, "aot_eager")
    if recompute:
        recompute_segments(joined)
    _step(apart)  # initializes from the data
    for module in joined.modules():
        if isinstance(module, DataInitConv2d):
            module.checked = True
    joined.load_state_dict(apart.state_dict())
    apart.zero_grad()
    loss, _ = _step(apart)
    calls: list[int] = []

    def counted(weights: list[torch.Tensor], *more: Any) -> list[torch.Tensor]:
        calls.append(len(weights))
        return weight_norms(weights, *more)

    for module in (normalization, together):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(together, "weight_norms", counted)
    other, _ = _step(joined)
    convs = [m for m in joined.modules() if isinstance(m, WeightNormConv2d)]
    assert sum(calls) == len(convs)
    assert len(calls) == -(-len(convs) // AT_ONCE)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    for (name, p), q in zip(apart.named_parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert all(conv.ready is None for conv in convs)


def test_weights_normalized_together_in_the_type_of_their_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under mixed precision bfloat16, but float32 in the heads that compute so."""
    model = NVAE(CONFIG)
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    with torch.autocast("cpu", torch.bfloat16), model.training_pass():
        types = {m.ready.dtype: m.full_precision for m in model.modules() if _is_ready(m)}
        assert types == {torch.bfloat16: False, torch.float32: True}
        output = model(torch.rand(2, 1, 8, 8).round())
    assert output.logits.dtype == torch.float32


def _is_ready(module: torch.nn.Module) -> bool:
    return isinstance(module, WeightNormConv2d) and module.ready is not None
