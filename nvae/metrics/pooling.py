"""One set of features from the shares of several processes."""

import torch
import torch.distributed as dist
from torch import Tensor

from nvae.metrics.distances import FeatureSet


def pool_features(share: FeatureSet, count: int) -> FeatureSet:
    """Everybody's images, where rank r of the process group holds images r, r + world, ...

    Sums travel, so unequal shares do no harm.

    Args:
        share: of this process; all keep features and logits, or none does.
        count: images of all processes.

    Returns:
        The moments of all images; on the first rank also their features and logits, where kept,
        in the order of the images. Those may be gigabytes, and one process compares them.
    """
    return FeatureSet(
        share.moments.pooled(),
        _interleaved(share.features, count),
        _interleaved(share.logits, count),
    )


def _interleaved(mine: Tensor | None, count: int) -> Tensor | None:
    if mine is None:
        return None
    world = dist.get_world_size()
    if dist.get_rank() != 0:
        dist.gather_object(mine)
        return None
    parts: list[Tensor] = [torch.empty(0)] * world
    dist.gather_object(mine, parts)
    everything = mine.new_empty(count, mine.shape[1])
    for rank, part in enumerate(parts):
        everything[rank::world] = part
    return everything
