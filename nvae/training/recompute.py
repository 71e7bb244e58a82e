"""What may be done to a model's repeated blocks: compiling, and gradient checkpointing.

A recomputed block's activations are not kept for the backward pass but computed again: memory for
time. The second computation must not count: batch normalization would move its running statistics
twice a step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nvae.models import HierarchicalVAE
from nvae.models.layers import BatchNorm
from nvae.training.memory import estimate_memory

USABLE_MEMORY = 0.8
"""Share of a GPU's memory that an estimate may fill; workspaces and fragmentation take the rest."""


@contextmanager
def frozen_statistics(norms: list[BatchNorm]) -> Iterator[None]:
    """Inside, running statistics stay as they are."""
    for norm in norms:
        norm.frozen = True
    try:
        yield
    finally:
        for norm in norms:
            norm.frozen = False


def _contexts(
    norms: list[BatchNorm],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), frozen_statistics(norms)


def _checkpointed(forward: Callable[[Tensor], Tensor], norms: list[BatchNorm], x: Tensor) -> Tensor:
    y: Tensor = checkpoint(
        forward, x, use_reentrant=False, preserve_rng_state=False,
        context_fn=partial(_contexts, norms),
    )  # fmt: skip
    return y


def recompute_blocks(model: HierarchicalVAE) -> None:
    """Let every block of ``model`` recompute its activations in the backward pass.

    Blocks draw no random numbers, so no generator state is kept. Parameters keep their names;
    without gradients (evaluation) nothing changes.
    """
    for block in model.blocks():
        norms = [m for m in block.modules() if isinstance(m, BatchNorm)]
        # a partial of a bound method is copied with its block (the weights' average does so)
        block.forward = partial(_checkpointed, block.forward, norms)


def should_recompute(
    build: Callable[[], HierarchicalVAE], batch_size: int, precision: str, average_on_device: bool
) -> bool:
    """Whether a training step would not fit in the GPU's memory without it, by estimate.

    Args:
        build: makes the model.
        batch_size: images of a micro-batch.
        precision: as in the trainer's configuration.
        average_on_device: a moving average of the weights lives beside the model.
    """
    estimate = estimate_memory(
        build, batch_size, precision=precision, average_on_device=average_on_device
    )
    return estimate.total > USABLE_MEMORY * torch.cuda.get_device_properties(0).total_memory


def compile_blocks(model: HierarchicalVAE, backend: str = "inductor") -> None:
    """Compile the repeated blocks in place, so that parameters keep their names."""
    # NVAE's cells share one forward, and each kind, width and mode is a graph of its own; at the
    # default of eight graphs the rest would silently stay uncompiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    for block in model.blocks():
        # the method and not the module, so that a recomputed block is compiled inside
        block.forward = torch.compile(block.forward, backend=backend)
