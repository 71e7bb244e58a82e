"""What may be done to parts of a model: compiling its blocks, recomputing its segments.

A recomputed segment's activations are not kept for the backward pass but computed again (gradient
checkpointing): memory for time. The second computation must not count: batch normalization would
move its running statistics twice a step. Several ranks repeat a segment's collectives in the order
of their backward passes, which is the same on all.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvae.models import HierarchicalVAE
from nvae.models.normalization import BatchNorm
from nvae.models.together import found_again
from nvae.objective import ObjectiveConfig
from nvae.training.memory import estimate_memory

USABLE_MEMORY = 0.8
"""Share of a GPU's memory that an estimate may fill; workspaces and fragmentation take the rest."""


@contextmanager
def second_pass(norms: list[BatchNorm], weights: AbstractContextManager[None]) -> Iterator[None]:
    """Inside, running statistics stay as they are and layers have the first pass's weights.

    Args:
        norms: of the segment.
        weights: see :func:`~nvae.models.together.found_again`.
    """
    for norm in norms:
        norm.frozen = True
    try:
        with weights:
            yield
    finally:
        for norm in norms:
            norm.frozen = False


def _contexts(
    modules: list[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    norms = [module for module in modules if isinstance(module, BatchNorm)]
    return nullcontext(), second_pass(norms, found_again(modules))


def _checkpointed(
    forward: Callable[..., Any], modules: list[nn.Module], *arguments: Any, **more: Any
) -> Any:
    return checkpoint(
        forward, *arguments, use_reentrant=False, preserve_rng_state=False,
        context_fn=partial(_contexts, modules), **more,
    )  # fmt: skip


def recompute_segments(model: HierarchicalVAE) -> None:
    """Let every segment of ``model`` recompute its activations in the backward pass.

    Segments draw no random numbers, so no generator state is kept. Parameters keep their names;
    without gradients (evaluation) nothing changes.
    """
    for segment in model.segments():
        # a partial of a bound method is copied with its segment (the weights' average does so)
        segment.forward = partial(_checkpointed, segment.forward, list(segment.modules()))


def should_recompute(
    build: Callable[[], HierarchicalVAE],
    batch_size: int,
    precision: str,
    average_on_device: bool,
    *,
    objective: ObjectiveConfig | None = None,
    synchronized: bool = False,
    kernels: str = "auto",
) -> bool:
    """Whether a training step would not fit in the GPU's memory without it, by estimate.

    Args:
        build: makes the model.
        batch_size: images of a micro-batch.
        precision: as in the trainer's configuration.
        average_on_device: a moving average of the weights lives beside the model.
        objective: of the run.
        synchronized: there are several ranks.
        kernels: the run's choice.
    """
    plain, _ = estimate_memory(
        build, batch_size, precision=precision, objective=objective,
        average_on_device=average_on_device, synchronized=synchronized,
        kernels=False if kernels == "reference" else None,
    )  # fmt: skip
    return plain.total > USABLE_MEMORY * torch.cuda.get_device_properties(0).total_memory


def compile_blocks(model: HierarchicalVAE, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated blocks in place, so that parameters keep their names."""
    # NVAE's cells share one forward, and each kind, width and mode is a graph of its own; at the
    # default of eight graphs the rest would silently stay uncompiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    # under DDP a graph would be cut where a gradient bucket ends, and older versions of torch raise
    # where it holds autograd functions; blocks are small, and gradients travel between them anyway
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks():
        # the method and not the module, so that what is recomputed is compiled inside; a partial of
        # the function, since a compiled bound method would stay bound to this block in a copy
        function = torch.compile(type(block).forward, backend=backend)
        block.forward = partial(function, block)
