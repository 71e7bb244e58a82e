"""What each kind of picture shows: labelled rows of images, still tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nvae.models import HierarchicalVAE, Temperature
from nvae.random import fold_in
from nvae.sampling.latents import (
    Latents,
    decode,
    encode,
    interpolate,
    resample_finer,
    traverse,
)
from nvae.sampling.nearest import Neighbours
from nvae.sampling.pixels import PixelTemperature


@dataclass(frozen=True)
class Sheet:
    """Labelled rows of images.

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


@dataclass(frozen=True)
class Decoder:
    """How latents become images on a sheet.

    Attributes:
        pixels: ``"mean"`` or a pixel temperature.
        batch_size: images in one pass.
    """

    pixels: PixelTemperature = "mean"
    batch_size: int = 64

    def __call__(
        self, model: HierarchicalVAE, latents: Latents, seeds: Tensor | None = None
    ) -> Tensor:
        """Images ``(B, C, H, W)`` on the CPU; ``seeds`` ``(B,)`` are of the pixel noise."""
        return decode(model, latents, self.pixels, seeds=seeds, batch_size=self.batch_size)


def reconstruction_sheet(
    model: HierarchicalVAE, x: Tensor, seeds: Tensor, batch_size: int = 64
) -> Sheet:
    """Rows: the images; the posterior mean decoded to its mean; a draw of latents and pixels.

    Args:
        model: any mode.
        x: ``(N, C, H, W)`` in [0, 1], on the model's device.
        seeds: ``(N,)`` int64, of the draw.
        batch_size: images in one pass.
    """
    mean = encode(model, x, batch_size=batch_size)
    drawn = encode(model, x, seeds=seeds, batch_size=batch_size)
    return Sheet(
        (
            x.cpu(),
            decode(model, mean, "mean", batch_size=batch_size),
            decode(model, drawn, 1.0, seeds=seeds, batch_size=batch_size),
        ),
        ("input", "mean", "sample"),
    )


def interpolation_sheet(
    model: HierarchicalVAE, latents: Latents, names: Sequence[str], steps: int, decoder: Decoder
) -> Sheet:
    """One row for every pair of neighbours in ``latents``: N - 1 paths of ``steps`` points.

    Raises:
        ValueError: fewer than two latents.
    """
    if len(latents) < 2:
        raise ValueError("one image has no path; give at least two")
    path = interpolate(model, latents[:-1], latents[1:], steps)
    images = decoder(model, path)
    labels = [f"{a} to {b}" for a, b in pairwise(names)]
    return Sheet(images.split(steps), tuple(labels))


def partial_sheet(
    model: HierarchicalVAE,
    latents: Latents,
    keep: Sequence[int],
    seeds: Tensor,
    decoder: Decoder,
    temperature: Temperature = 1.0,
) -> Sheet:
    """One image: the original, then one column a seed; one row for every number of groups kept.

    Args:
        model: any mode.
        latents: of one image.
        keep: numbers of coarsest groups that stay, one row each.
        seeds: ``(S,)`` int64, of the groups that are drawn, one column each; the same noise in
            every row.
        decoder: to images.
        temperature: of the groups that are drawn.
    """
    rows = []
    original = decoder(model, latents)
    for count in keep:
        drawn = resample_finer(model, latents.repeat(len(seeds)), count, seeds, temperature)
        rows.append(torch.cat([original, decoder(model, drawn, seeds)]))
    groups = len(latents.z)
    return Sheet(
        tuple(rows),
        tuple(f"{count} of {groups}" for count in keep),
        ("all", *("" for _ in seeds)),
    )


def traversal_sheet(
    model: HierarchicalVAE,
    latents: Latents,
    groups: Sequence[int],
    steps: int,
    seed: int,
    decoder: Decoder,
) -> Sheet:
    """One image; one row for every group, which turns by half a circle from left to right.

    Args:
        model: any mode.
        latents: of one image.
        groups: 0 is the coarsest.
        steps: columns.
        seed: of the directions.
        decoder: to images.
    """
    seeds = torch.tensor([seed])
    rows = [decoder(model, traverse(model, latents, group, steps, seeds)) for group in groups]
    angles = [f"{180 * step / (steps - 1):.0f}" for step in range(steps)]
    return Sheet(tuple(rows), tuple(f"group {group}" for group in groups), tuple(angles))


def nearest_sheet(samples: Tensor, found: Neighbours, names: Sequence[str]) -> Sheet:
    """One row a sample: the sample, then its neighbours from near to far.

    Args:
        samples: ``(Q, C, H, W)``.
        found: the samples' neighbours.
        names: of the samples.
    """
    rows = [
        torch.cat([sample[None], near]).cpu()
        for sample, near in zip(samples, found.images, strict=True)
    ]
    columns = ("sample", *(f"{rank + 1}." for rank in range(found.images.shape[1])))
    return Sheet(tuple(rows), tuple(names), columns)


def column_seeds(seed: int, columns: int) -> Tensor:
    """Seeds ``(columns,)`` for the draws beside one image, unlike those of other images."""
    keys = torch.tensor([seed], dtype=torch.int64)
    return fold_in(keys, torch.arange(1, columns + 1))


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``0 .. count - 1``, evenly spread, both ends included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
