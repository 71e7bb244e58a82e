"""The estimate, traced on a GPU that is not there, against what real steps hold on the CPU."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from nvae.models import MODELS, NVAE, HierarchicalVAE, ModelConfig, normalization, together
from nvae.objective import ObjectiveConfig, build_objective
from nvae.ops import library
from nvae.regularizers import batchnorms
from nvae.training import memory
from nvae.training.memory import MemoryEstimate, estimate_memory
from nvae.training.recompute import recompute_segments, should_recompute
from tests.models.small import VERY_DEEP
from tests.training.ranks import run_ranks
from tests.training.runs import RECIPES

CONFIG = ModelConfig(
    image_size=16, image_channels=3, likelihood="logistic_mixture", num_mixtures=3, num_scales=2,
    groups_per_scale=2, preprocess_blocks=1, preprocess_cells=2, postprocess_cells=2,
    encoder_channels=8, decoder_channels=8, latent_channels=4, num_flows=1,
)  # fmt: skip
BUILD = partial(NVAE, CONFIG)
BATCH = 8
PATHS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "32", "kernels": False},
    "bfloat16": {"precision": "bf16-mixed", "kernels": False},
    "kernels": {"precision": "bf16-mixed", "kernels": True},
    "vdvae": {"precision": "32", "kernels": False},
    "evdvae": {"precision": "bf16-mixed", "kernels": False},
}
LIKE_OTHERS = ("float32", "vdvae")


def build_of(path: str) -> Callable[[], HierarchicalVAE]:
    return partial(MODELS[path], VERY_DEEP[path]()) if path in VERY_DEEP else BUILD


def objective_of(path: str) -> ObjectiveConfig:
    found: ObjectiveConfig = RECIPES[path]["objective"] if path in VERY_DEEP else ObjectiveConfig()
    return found


def held_after(run: Callable[[], Any]) -> int:
    """Bytes that the allocator has given out more than it has taken back, the result alive.

    What reference cycles hold is collected at the two ends alone, since memory that earlier tests
    left in them, freed in between, would be taken off.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
        gc.collect()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del result
    return held


class Step(nn.Module):
    """The forward pass of a training step, of one that is not the first."""

    def __init__(self, path: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build_of(path)().to(memory_format=torch.channels_last)
        self.objective = build_objective(self.model, objective_of(path))
        if self.objective.spectral_norm is not None:
            self.objective.spectral_norm.is_warm = True
        self.half = PATHS[path]["precision"] != "32"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext():
            noise = self.model.draw_noise(len(x))
            loss = self.objective(self.model, x, noise, step=9, total_steps=100)
        return loss.data if loss.penalty is None else loss.data + loss.penalty


def measured(rank: int, world: int, path: str, recompute: bool) -> list[int]:
    """Bytes held between a real step's forward and backward pass; of several ranks also after."""
    kernels = PATHS[path]["kernels"]
    with pytest.MonkeyPatch.context() as patch, library.assuming_kernels(kernels):
        if kernels:  # the registered ops, which keep the same whatever computes them
            patch.setattr(library, "_not_applicable", lambda *_: None)
            for module in (normalization, together):
                patch.setattr(module, "has_kernels", lambda device: True)
        step = Step(path)
        if recompute:
            recompute_segments(step.model)
        c = step.model.config
        x = torch.rand(BATCH, c.image_channels, c.image_size, c.image_size)
        x = x.to(memory_format=torch.channels_last)
        if world == 1:
            return [held_after(lambda: step(x))]
        for norm in batchnorms(step):
            norm.group = dist.group.WORLD

        forward = held_after(lambda: step(x))
        # not by the profiler, to which what one of gloo's threads frees last would seem held
        DistributedDataParallel(step, gradient_as_bucket_view=True)(x).backward()
        buckets = {p.grad.untyped_storage() for p in step.parameters() if p.grad is not None}
        return [forward, sum(bucket.nbytes() for bucket in buckets)]


def estimated(path: str, synchronized: bool = False) -> tuple[MemoryEstimate, MemoryEstimate]:
    return estimate_memory(
        build_of(path), BATCH, objective=objective_of(path), synchronized=synchronized,
        **PATHS[path],
    )  # fmt: skip


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.exhaustive] * (p in LIKE_OTHERS)) for p in PATHS]
)
def test_estimate_is_what_a_step_holds(path: str) -> None:
    """Activations, the loss and the spectral term's stacked weights, on every path of one GPU.

    Of the other families, which have no such term, on one each.
    """
    for recompute, estimate in zip((False, True), estimated(path), strict=True):
        (real,) = measured(0, 1, path, recompute)
        # the other families' networks are so small that some KiB weigh more
        tolerance = 0.04 if path in VERY_DEEP else 0.02
        assert estimate.activations + estimate.regularizers == pytest.approx(real, rel=tolerance)


@pytest.mark.parametrize(
    "path", ["bfloat16", pytest.param("kernels", marks=pytest.mark.exhaustive)]
)
def test_estimate_is_what_a_step_of_several_ranks_holds(path: str) -> None:
    """Statistics that ranks share take another path; gradients are the buckets, once."""
    plain, _ = estimated(path, synchronized=True)
    for forward, after in run_ranks(measured, 2, path, False):
        assert plain.activations + plain.regularizers == pytest.approx(forward, rel=0.02)
        assert plain.gradients == pytest.approx(after, rel=0.1)


def test_kernels_keep_less() -> None:
    assert estimated("kernels")[0].activations < 0.95 * estimated("bfloat16")[0].activations
    assert estimated("bfloat16")[0].activations < 0.8 * estimated("float32")[0].activations


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_auto_recomputes_what_would_not_fit(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    """By what this machine's GPU would run, for one rank and for several."""
    monkeypatch.setattr(memory, "runs_kernels", lambda: kernels)
    for synchronized in (False, True):
        plain, _ = estimate_memory(
            BUILD, BATCH, precision="bf16-mixed", synchronized=synchronized, kernels=kernels
        )
        for share, expected in ((0.81, False), (0.79, True)):
            has = SimpleNamespace(total_memory=plain.total / 0.8 * share / 0.8)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, has=has: has)
            decided = should_recompute(BUILD, BATCH, "bf16-mixed", False, synchronized=synchronized)
            assert decided == expected


def test_ranks_trace_on_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced tensor makes torch open a GPU; eight ranks must not open the same one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device", lambda index: index)
    for name in memory.LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    assert memory.own_gpu() == 0
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert memory.own_gpu() == 5
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert memory.own_gpu() == 3


def test_recomputed_groups_keep_their_inputs_alone() -> None:
    """Activations fall to what goes into segments and what the loss keeps."""
    plain, recomputed = estimated("kernels")
    assert recomputed.activations < 0.3 * plain.activations
    assert 0 < recomputed.segment < 0.3 * plain.activations
    assert recomputed.total < plain.total


def test_activations_grow_with_the_batch_and_weights_do_not() -> None:
    (one, _), (four, _) = (estimate_memory(BUILD, n, kernels=True) for n in (1, 4))
    assert 3 < four.activations / one.activations <= 4.01
    assert (one.weights, one.regularizers) == (four.weights, four.regularizers)
    parameters = sum(p.numel() for p in NVAE(CONFIG).parameters())
    assert one.gradients == 4 * parameters
    assert one.optimizer == 8 * parameters


def test_regularizers_and_average_are_counted_where_there_are_any() -> None:
    off = ObjectiveConfig(spectral_weight=0)
    without, _ = estimate_memory(BUILD, 1, kernels=True, objective=off)
    full, _ = estimate_memory(BUILD, 1, kernels=True, average_on_device=True)
    assert without.regularizers == without.average == 0
    normalized = sum(m.weight.numel() for m in NVAE(CONFIG).modules() if hasattr(m, "log_gain"))
    assert 1 < full.regularizers / (4 * normalized) < 1.2  # and singular vectors
    assert full.average == full.weights
