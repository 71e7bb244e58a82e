"""How much memory a training step takes, worked out without running it.

Activations are counted by tracing a forward pass with tensors that have shapes and no storage, and
adding up what autograd keeps. Weights, gradients and optimizer state follow from the parameters.
Not counted: the kernels' workspaces, fragmentation and the CUDA context; `benchmarks/memory.py`
prints the estimate beside a measured peak.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nvae.models import HierarchicalVAE

BYTES = 4
"""Weights, gradients and optimizer state are float32 in every precision."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights: parameters and buffers.
        gradients: one for every parameter.
        optimizer: two moments for every parameter.
        average: moving average of the weights, where it is kept on the device.
        activations: kept between forward and backward.
        largest_cell: the activations of one cell at a time, where cells are recomputed; else 0.
        update: copies that the optimizer makes while it steps.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    largest_cell: int
    update: int

    @property
    def total(self) -> int:
        """The peak: activations are gone when the optimizer steps."""
        standing = self.weights + self.gradients + self.optimizer + self.average
        return standing + max(self.activations + self.largest_cell, self.update)


class SavedBytes:
    """Adds up the storages that autograd keeps inside :meth:`counting`; shared ones count once."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, Tensor] = {}

    def ignore(self, module: nn.Module) -> None:
        """Weights that autograd refers to are counted as weights."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._seen[tensor.untyped_storage()._cdata] = tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # keeps it alive: addresses are not reused
            self.total += storage.nbytes()
        return tensor


def activation_bytes(
    model: HierarchicalVAE, batch_size: int, precision: str = "32"
) -> tuple[int, int, list[int]]:
    """What a forward pass keeps for backward.

    Args:
        model: on any device with storage, or made under a :class:`FakeTensorMode`.
        batch_size: images.
        precision: ``32``, ``bf16-mixed`` or ``16-mixed``.

    Returns:
        Bytes in all; bytes where every cell keeps its input alone; bytes of every cell.
    """
    config = model.config
    saved = SavedBytes()
    saved.ignore(model)
    cells: list[int] = []
    inputs = 0
    starts: list[int] = []

    def begin(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal inputs
        x = arguments[0]
        inputs += x.numel() * x.element_size()
        starts.append(saved.total)

    def end(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        cells.append(saved.total - starts.pop())

    handles = []
    for block in model.blocks():
        handles += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
    x = torch.zeros(
        batch_size, config.image_channels, config.image_size, config.image_size,
        device=model.device, dtype=model.dtype,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    autocast = nullcontext() if half is None else torch.autocast(model.device.type, half)
    was_training = model.training
    model.train()
    try:
        with saved.counting(), autocast:
            output = model(x)
            _ = -model.likelihood(output.logits).log_prob(x).mean() + output.kl_per_group.sum()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return saved.total, saved.total - sum(cells) + inputs, cells


def estimate_memory(
    build: Callable[[], HierarchicalVAE],
    batch_size: int,
    *,
    precision: str = "32",
    checkpoint_cells: bool = False,
    average_on_device: bool = False,
) -> MemoryEstimate:
    """The estimate for a training step, at the price of one traced forward pass.

    Args:
        build: makes the model.
        batch_size: images of a micro-batch.
        precision: as in the trainer's configuration.
        checkpoint_cells: cells are recomputed in the backward pass.
        average_on_device: a moving average of the weights lives beside the model.
    """
    # the traced half precision is bfloat16: shapes and sizes are float16's
    traced = "32" if precision == "32" else "bf16-mixed"
    with FakeTensorMode():
        model = build()
        kept, kept_inputs, cells = activation_bytes(model, batch_size, traced)
    parameters = sum(p.numel() for p in model.parameters()) * BYTES
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return MemoryEstimate(
        weights=parameters + buffers,
        gradients=parameters,
        optimizer=2 * parameters,
        average=parameters + buffers if average_on_device else 0,
        activations=kept_inputs if checkpoint_cells else kept,
        largest_cell=max(cells, default=0) if checkpoint_cells else 0,
        update=2 * parameters,
    )
