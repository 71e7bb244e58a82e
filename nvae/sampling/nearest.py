"""Nearest training images of samples: does the model copy?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class IndexedImages(Protocol):
    """A batch of images and their places in the split."""

    @property
    def x(self) -> Tensor:
        """``(B, C, H, W)`` in [0, 1]."""
        ...

    @property
    def index(self) -> Tensor:
        """``(B,)`` int64."""
        ...


@dataclass(frozen=True)
class Neighbours:
    """The K nearest images of Q queries, nearest first.

    Attributes:
        images: ``(Q, K, C, H, W)``.
        index: ``(Q, K)`` int64, in the split that was searched.
        distance: ``(Q, K)``, root mean square difference of pixels in [0, 1].
    """

    images: Tensor
    index: Tensor
    distance: Tensor


@torch.no_grad()
def nearest_images(queries: Tensor, batches: Iterable[IndexedImages], k: int) -> Neighbours:
    """Search all ``batches`` for the images nearest to ``queries`` by pixel distance.

    Args:
        queries: ``(Q, C, H, W)`` in [0, 1].
        batches: searched one after another; only the best so far are kept.
        k: neighbours of each query.

    Returns:
        Tensors on the queries' device; fewer than ``k`` neighbours if there are fewer images.

    Raises:
        ValueError: no images to search, or ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"neighbours is {k}; it must be at least 1")
    flat = queries.flatten(1)
    best: Neighbours | None = None
    for batch in batches:
        x = batch.x.to(queries)
        # differences, not the expanded square: that cancels where images are close
        distance = torch.cdist(flat, x.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        index = batch.index.to(queries.device).expand(len(queries), -1)
        images = x.expand(len(queries), *x.shape)
        if best is not None:
            distance = torch.cat([best.distance, distance], dim=1)
            index = torch.cat([best.index, index], dim=1)
        distance, order = distance.topk(min(k, distance.shape[1]), largest=False, sorted=True)
        best = Neighbours(_take(best, images, order), index.gather(1, order), distance)
    if best is None:
        raise ValueError("no images to search")
    return Neighbours(best.images, best.index, best.distance / flat.shape[1] ** 0.5)


def _take(best: Neighbours | None, images: Tensor, order: Tensor) -> Tensor:
    """The chosen images, without a copy of the whole batch for every query."""
    known = 0 if best is None else best.images.shape[1]
    rows = torch.arange(len(order), device=order.device)[:, None]
    fresh = images[rows, (order - known).clamp(min=0)]
    if best is None:
        return fresh
    old = best.images[rows, order.clamp(max=known - 1)]
    return torch.where((order < known)[:, :, None, None, None], old, fresh)
