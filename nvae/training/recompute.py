"""Gradient checkpointing of a model's repeated blocks: memory for time.

A block's activations are not kept for the backward pass but computed again. The second computation
must not count: batch normalisation would move its running statistics twice a step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nvae.models import HierarchicalVAE
from nvae.models.layers import BatchNorm


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
