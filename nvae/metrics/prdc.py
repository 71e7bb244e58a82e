"""Precision, recall, density and coverage of generated images.

Every real and every generated image has a ball that reaches to its k-th nearest neighbour of its
own kind (Kynkaanniemi et al. 2019, equations 1 and 2; Naeem et al. 2020, equations 4 and 5):
precision and recall ask which images fall into a ball of the other kind; density counts how many
real balls a generated image falls into, coverage how many real balls hold a generated image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048


@dataclass(frozen=True)
class Prdc:
    """All between 0 and 1, but density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, generated: Tensor, neighbours: int = 5) -> Prdc:
    """Compare two sets of features.

    Args:
        real: ``(N, D)``.
        generated: ``(M, D)``.
        neighbours: k.

    Raises:
        ValueError: not more than k images of a kind.
    """
    check_neighbours(len(real), len(generated), neighbours)
    # the expanded square cancels less around the origin
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    real_radius = _radii(real, neighbours)
    generated_radius = _radii(generated, neighbours)
    in_real_balls = 0
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full((len(real),), torch.inf, dtype=real.dtype, device=real.device)
    for rows, radius in zip(generated.split(_ROWS), generated_radius.split(_ROWS), strict=True):
        distance = _distances(rows, real)  # (rows, N)
        inside = distance <= real_radius
        in_real_balls += int(inside.sum())
        precise += int(inside.any(1).sum())
        recalled |= (distance <= radius[:, None]).any(0)
        nearest = torch.minimum(nearest, distance.amin(0))
    return Prdc(
        precision=precise / len(generated),
        recall=recalled.double().mean().item(),
        density=in_real_balls / (neighbours * len(generated)),
        coverage=(nearest <= real_radius).double().mean().item(),
    )


def check_neighbours(real: int, generated: int, neighbours: int) -> None:
    """Raise a ValueError unless there are more than ``neighbours`` images of both kinds."""
    for kind, images in (("real", real), ("generated", generated)):
        if images <= neighbours:
            raise ValueError(
                f"prdc with {neighbours} neighbours needs more than {neighbours} {kind} images, "
                f"there are {images}"
            )


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # + 1: the nearest of all is the image itself
    radii = [
        _distances(rows, features).kthvalue(neighbours + 1, dim=1).values
        for rows in features.split(_ROWS)
    ]
    return torch.cat(radii)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, ``(A, B)``, by matrix products."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
