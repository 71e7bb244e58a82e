"""How much memory a training step takes, worked out without running it.

A forward pass with the loss is traced on a GPU whose tensors have shapes and no storage, by that
GPU's rules for mixed precision and through the kernels where it has them, and what autograd keeps
is added up. Weights, gradients and optimizer state follow from the parameters. Not counted: the
kernels' workspaces, what the backward pass makes and frees, fragmentation and the CUDA context;
`benchmarks/memory.py` prints the estimate beside a measured peak.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nvae.models import HierarchicalVAE
from nvae.models.layers import DataInitConv2d
from nvae.models.normalization import BatchNorm
from nvae.models.together import handed_in
from nvae.objective import Objective, ObjectiveConfig
from nvae.ops.library import assuming_kernels, has_kernels

BYTES = 4
"""Weights, gradients and optimizer state are float32 in every precision."""

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The lower type of a precision that has one."""

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Where torchrun, Lightning and SLURM say which of a machine's processes this is."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: parameters and buffers.
        gradients: one for every parameter; of several ranks, their buckets, which are the
            gradients.
        optimizer: two moments for every parameter.
        average: moving average of the weights, where it is kept on the device.
        activations: kept between forward and backward, the loss included.
        regularizers: kept between the two by the spectral term: the weights, stacked.
        segment: where segments are recomputed, those of one at a time, or mixed precision's copies
            of the weights at the end of the forward pass if they are more; else 0.
        update: copies that the optimizer makes while it steps.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    regularizers: int
    segment: int
    update: int

    @property
    def standing(self) -> int:
        """What is there at any time."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def total(self) -> int:
        """The peak: activations are gone when the optimizer steps."""
        return self.standing + max(self.activations + self.regularizers + self.segment, self.update)


@dataclass(frozen=True)
class KeptBytes:
    """What a forward pass keeps for backward, in bytes.

    Attributes:
        whole: activations where nothing is recomputed.
        outside: where every segment keeps its inputs alone.
        segments: what the recomputation of each needs, in the order of the pass.
        regularizers: see :class:`MemoryEstimate`.
    """

    whole: int
    outside: int
    segments: tuple[int, ...]
    regularizers: int


class SavedBytes:
    """Adds up storages; those that are shared count once, those of ``known`` tensors never."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, Tensor] = {}

    def ignore(self, module: nn.Module) -> None:
        """Weights that autograd refers to are counted as weights."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._seen[tensor.untyped_storage()._cdata] = tensor

    def has(self, tensor: Tensor) -> bool:
        """Whether its storage is counted, or never will be."""
        return tensor.untyped_storage()._cdata in self._seen

    def add(self, tensor: Tensor) -> None:
        """Count a storage, unless it is counted."""
        if not self.has(tensor):
            # the tensor is kept alive: addresses are not reused
            self._seen[tensor.untyped_storage()._cdata] = tensor
            self.total += tensor.untyped_storage().nbytes()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, what autograd saves is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor


class _Ledger:
    """Counts what is saved, in all and by segment, while a pass runs."""

    def __init__(self, model: HierarchicalVAE) -> None:
        self.whole, self.outside = SavedBytes(), SavedBytes()
        for each in (self.whole, self.outside):
            each.ignore(model)
        self.segments: list[int] = []
        self._inside: SavedBytes | None = None

    @contextmanager
    def watching(self, segments: list[nn.Module]) -> Iterator[None]:
        """Inside, what autograd saves is counted."""
        handles = []
        for segment in segments:
            handles.append(segment.register_forward_pre_hook(self._begin, with_kwargs=True))
            handles.append(segment.register_forward_hook(self._end))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...], more: dict[str, Any]) -> None:
        # what the pass has made of the weights beforehand is handed in, too
        for argument in (*arguments, *more.values(), *handed_in(module)):
            if isinstance(argument, Tensor):
                self.outside.add(argument)
        self._inside = SavedBytes()

    def _end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        assert self._inside is not None
        self.segments.append(self._inside.total)
        self._inside = None

    def _pack(self, tensor: Tensor) -> Tensor:
        self.whole.add(tensor)
        if self._inside is None:
            self.outside.add(tensor)
        elif not self.outside.has(tensor):
            self._inside.add(tensor)
        return tensor


def kept_bytes(model: HierarchicalVAE, objective: Objective, x: Tensor) -> KeptBytes:
    """What the forward pass of a training step keeps for backward.

    Args:
        model: in training mode; autocast and kernels are as around the call.
        objective: of the model.
        x: a batch, with or without storage.
    """
    settings, ledger, spectral = objective.config, _Ledger(model), SavedBytes()
    noise = model.draw_noise(len(x))
    input_noise = torch.zeros_like(x) if settings.encoder_noise else None
    with ledger.watching(model.segments()):
        # at the end of the run: KL balancing would ask the other ranks
        loss = objective(
            model, x, noise, step=1, total_steps=1, input_noise=input_noise, regularize=False
        )
    spectral.ignore(model)
    with spectral.counting():
        penalties = objective.regularizers() if settings.spectral_weight else {}
    del loss, penalties
    return KeptBytes(
        ledger.whole.total, ledger.outside.total, tuple(ledger.segments), spectral.total
    )


def estimate_memory(
    build: Callable[[], HierarchicalVAE],
    batch_size: int,
    *,
    precision: str = "32",
    objective: ObjectiveConfig | None = None,
    average_on_device: bool = False,
    synchronized: bool = False,
    kernels: bool | None = None,
) -> tuple[MemoryEstimate, MemoryEstimate]:
    """The estimates for a training step, at the price of one traced forward pass.

    Args:
        build: makes the model.
        batch_size: images of a micro-batch.
        precision: as in the trainer's configuration.
        objective: its regularizers and noise are counted, terms of a class of one's own are not.
        average_on_device: a moving average of the weights lives beside the model.
        synchronized: several ranks share the statistics of batch normalization.
        kernels: whether the GPU has our kernels; None: as this machine's.

    Returns:
        Without recomputation, and where every segment of the model is recomputed.
    """
    kernels = runs_kernels() if kernels is None else kernels
    with own_gpu(), FakeTensorMode(), assuming_kernels(kernels), _autocast(HALF.get(precision)):
        model, kept = trace(build, batch_size, objective or ObjectiveConfig(), synchronized)
    parameters = sum(p.numel() for p in model.parameters()) * BYTES
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    copies = 2 * sum(m.weight.numel() for m in layers) if precision in HALF else 0
    plain = MemoryEstimate(
        weights=parameters + buffers,
        gradients=parameters,
        optimizer=2 * parameters,
        average=parameters + buffers if average_on_device else 0,
        activations=kept.whole,
        regularizers=kept.regularizers,
        segment=0,
        update=2 * parameters,
    )
    segment = max((*kept.segments, copies))
    return plain, replace(plain, activations=kept.outside, segment=segment)


def own_gpu() -> AbstractContextManager[Any]:
    """This rank's GPU as the current one: torch begins to use it when a traced tensor names it.

    All ranks of a machine would else take some hundred MB of the first GPU.
    """
    if not torch.cuda.is_available():
        return nullcontext()
    local = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "0")
    return torch.cuda.device(int(local) % torch.cuda.device_count())


def runs_kernels() -> bool:
    """Whether this rank's GPU does; False without one."""
    with own_gpu():  # to find out, a kernel is run
        return torch.cuda.is_available() and has_kernels(torch.device("cuda"))


def trace(
    build: Callable[[], HierarchicalVAE],
    batch_size: int,
    settings: ObjectiveConfig,
    synchronized: bool = False,
) -> tuple[HierarchicalVAE, KeptBytes]:
    """A model on a GPU without storage, and what a pass through it keeps.

    Call it under a :class:`FakeTensorMode`; arguments as for :func:`estimate_memory`.
    """
    model = on_traced_gpu(build()).train()
    for module in model.modules():
        if isinstance(module, DataInitConv2d):
            module.checked = True  # there is nothing to read from this device
        if isinstance(module, BatchNorm) and synchronized:
            module.group = _EveryRank()  # type: ignore[assignment]
    settings = replace(settings, name="elbo", options={}, free_bits=0.0)
    objective = Objective(model, settings).to(model.device)
    if objective.spectral_norm is not None:
        objective.spectral_norm.is_warm = True
    shape = (batch_size, *model.config.image_shape)
    x = torch.zeros(shape, device=model.device).to(memory_format=torch.channels_last)
    return model, kept_bytes(model, objective, x)


def on_traced_gpu(model: HierarchicalVAE) -> HierarchicalVAE:
    """Put a model without storage on a GPU that need not be there, in channels_last.

    ``Module.to`` would swap its parameters' contents, which tensors without storage do not take.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in moved:
                layout = torch.channels_last if p.ndim == 4 else torch.preserve_format
                there = p.detach().to("cuda", memory_format=layout)
                moved[id(p)] = nn.Parameter(there, requires_grad=p.requires_grad)
            setattr(module, name, moved[id(p)])
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, b.to("cuda"))
    return model


@contextmanager
def _autocast(half: torch.dtype | None) -> Iterator[None]:
    """Mixed precision on the traced GPU; without a real one ``torch.autocast`` turns itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.autocast_increment_nesting()
    try:
        torch.set_autocast_enabled("cuda", half is not None)
        if half is not None:
            torch.set_autocast_dtype("cuda", half)
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class _EveryRank:
    """Stands for a process group while a pass is traced: what is reduced keeps its size."""

    def allreduce(self, tensors: list[Tensor], options: Any) -> "_EveryRank":
        """Nothing to add."""
        return self

    def wait(self) -> None:
        """Nothing to wait for."""
