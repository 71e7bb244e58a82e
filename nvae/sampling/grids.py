"""What each kind of picture shows: labeled rows of images, still tensors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from nvae.models import HierarchicalVAE, Temperature
from nvae.random import fold_in
from nvae.sampling.latents import Latents, decode, encode, interpolate, resample_finer, traverse


@dataclass(frozen=True)
class Grid:
    """Labeled rows of images.

    Attributes:
        rows: each ``(N, C, H, W)`` in [0, 1] on the CPU, all with one N.
        row_labels: one a row.
        column_labels: one a column, or None.
    """

    rows: tuple[Tensor, ...]
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...] | None = None

    @property
    def images(self) -> Tensor:
        """All images, row by row."""
        return torch.cat(self.rows)


Draw = Callable[..., Tensor]
"""Latents to images: :func:`decode`, perhaps with some of its arguments given."""


def reconstruction_grid(
    model: HierarchicalVAE,
    x: Tensor,
    seeds: Tensor,
    batch_size: int = 64,
    labels: Tensor | None = None,
) -> Grid:
    """Rows: images; the posterior mean decoded to its mean; a draw of latents and pixels.

    The images ``x`` are ``(N, C, H, W)`` in [0, 1], the draw's ``seeds`` and the ``labels``, if
    any, ``(N,)`` int64.
    """
    mean = encode(model, x, labels=labels, batch_size=batch_size)
    drawn = encode(model, x, seeds=seeds, labels=labels, batch_size=batch_size)
    return Grid(
        (
            x.cpu(),
            decode(model, mean, "mean", batch_size=batch_size),
            decode(model, drawn, 1.0, seeds=seeds, batch_size=batch_size),
        ),
        ("input", "mean", "sample"),
    )


def interpolation_grid(
    model: HierarchicalVAE, latents: Latents, names: Sequence[str], steps: int, draw: Draw
) -> Grid:
    """One row for every pair of neighbors in ``latents``: N - 1 paths of ``steps`` points.

    Raises:
        ValueError: fewer than two latents.
    """
    if len(latents) < 2:
        raise ValueError("one image has no path; give at least two")
    images = draw(model, interpolate(model, latents[:-1], latents[1:], steps))
    return Grid(images.split(steps), tuple(f"{a} to {b}" for a, b in pairwise(names)))


def partial_grid(
    model: HierarchicalVAE,
    latents: Latents,
    keep: Sequence[int],
    seeds: Tensor,
    draw: Draw,
    temperature: Temperature = 1.0,
) -> Grid:
    """One image: the original, then one column a seed; one row for every number of groups kept.

    Args:
        model: the latents' own.
        latents: one image's.
        keep: numbers of coarsest groups that stay.
        seeds: ``(S,)`` int64, for the groups that are drawn; the same noise in every row.
        draw: latents to images.
        temperature: for the groups that are drawn.
    """
    rows = []
    original = draw(model, latents)
    for count in keep:
        drawn = resample_finer(model, latents.repeat(len(seeds)), count, seeds, temperature)
        rows.append(torch.cat([original, draw(model, drawn, seeds=seeds)]))
    groups = len(latents.z)
    return Grid(
        tuple(rows),
        tuple(f"{count} of {groups}" for count in keep),
        ("all", *("" for _ in seeds)),
    )


def traversal_grid(
    model: HierarchicalVAE,
    latents: Latents,
    groups: Sequence[int],
    steps: int,
    seed: int,
    draw: Draw,
) -> Grid:
    """One image; one row for every group, which turns by half a circle in ``steps`` columns.

    Group 0 is the coarsest; ``seed`` is of the directions. See :func:`traverse`.
    """
    seeds = torch.tensor([seed])
    rows = [draw(model, traverse(model, latents, group, steps, seeds)) for group in groups]
    angles = [f"{180 * step / (steps - 1):.0f}" for step in range(steps)]
    return Grid(tuple(rows), tuple(f"group {group}" for group in groups), tuple(angles))


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
class Neighbors:
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
def nearest_images(queries: Tensor, batches: Iterable[IndexedImages], k: int) -> Neighbors:
    """Search all ``batches`` for the images nearest to ``queries`` by pixel distance.

    Args:
        queries: ``(Q, C, H, W)`` in [0, 1].
        batches: searched one after another; only the best so far are kept.
        k: neighbors of each query.

    Returns:
        Tensors on the queries' device; fewer than ``k`` neighbors if there are fewer images.

    Raises:
        ValueError: no images to search, or ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"neighbors is {k}; it must be at least 1")
    flat = queries.flatten(1)
    best: Neighbors | None = None
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
        best = Neighbors(_take(best, images, order), index.gather(1, order), distance)
    if best is None:
        raise ValueError("no images to search")
    return Neighbors(best.images, best.index, best.distance / flat.shape[1] ** 0.5)


def _take(best: Neighbors | None, images: Tensor, order: Tensor) -> Tensor:
    """The chosen images, without a copy of the whole batch for every query."""
    known = 0 if best is None else best.images.shape[1]
    rows = torch.arange(len(order), device=order.device)[:, None]
    fresh = images[rows, (order - known).clamp(min=0)]
    if best is None:
        return fresh
    old = best.images[rows, order.clamp(max=known - 1)]
    return torch.where((order < known)[:, :, None, None, None], old, fresh)


def nearest_grid(samples: Tensor, found: Neighbors, names: Sequence[str]) -> Grid:
    """One row for each of ``samples`` ``(Q, C, H, W)``, then its neighbors from near to far."""
    rows = [
        torch.cat([sample[None], near]).cpu()
        for sample, near in zip(samples, found.images, strict=True)
    ]
    columns = ("sample", *(f"{rank + 1}." for rank in range(found.images.shape[1])))
    return Grid(tuple(rows), tuple(names), columns)


def column_seeds(seed: int, columns: int) -> Tensor:
    """Seeds ``(columns,)`` for the draws beside one image, unlike those of other images."""
    keys = torch.tensor([seed], dtype=torch.int64)
    return fold_in(keys, torch.arange(1, columns + 1))


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``0 .. count - 1``, evenly spread, both ends included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
