"""Distances between two sets of features: the numbers that papers print.

FID, KID and the Inception score are torch-fidelity's own computations, so that they mean what
they mean elsewhere. Precision, recall, density and coverage are ours: torch-fidelity has the first
two alone, and all four come from one pass over the same distances.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from nvae.evaluation.features import FeatureMoments, FeatureSet
from nvae.settings import check_fields

METRICS = ("fid", "kid", "prdc", "is")
NEEDS_FEATURES = frozenset({"kid", "prdc"})
"""Metrics that need every image's features, not their moments alone."""

_ROWS = 2048
"""Images whose distances to all others are in memory at a time."""


@dataclass(frozen=True)
class DistanceSettings:
    """Choices that change the numbers.

    Attributes:
        neighbors: k of prdc.
        kid_subsets: subsets that KID is averaged over.
        kid_subset_size: images in each.
        is_splits: parts that the Inception score is averaged over.
        seed: draws subsets and parts; NumPy's, at most 32 bits.

    Raises:
        ValueError: a number is out of bounds.
    """

    neighbors: int = 5
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    is_splits: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self, neighbors=(1, 1_000_000), kid_subsets=(1, 100_000),
            kid_subset_size=(2, 1_000_000), is_splits=(1, 1_000_000), seed=(0, 2**32 - 1),
        )  # fmt: skip


def check_metrics(names: Sequence[str]) -> None:
    """Raise a ValueError if a name is unknown."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics names {name!r}; allowed: {', '.join(METRICS)}")


def check_possible(
    names: Sequence[str],
    real: int,
    generated: int,
    *,
    logits: bool,
    settings: DistanceSettings | None = None,
) -> None:
    """Raise what :func:`distances` would, from numbers alone: before any feature is taken.

    Args:
        names: some of ``METRICS``.
        real: number of data images.
        generated: number of samples.
        logits: the extractor gives class logits.
        settings: None takes the customary values.
    """
    check_metrics(names)
    settings = settings or DistanceSettings()
    for kind, images in (("real", real), ("generated", generated)):
        if "fid" in names and images < 2:
            raise ValueError(f"fid needs at least 2 {kind} images, there are {images}")
        if "kid" in names and images < settings.kid_subset_size:
            raise ValueError(
                f"kid_subset_size is {settings.kid_subset_size}, but there are only {images} "
                f"{kind} images"
            )
        if "prdc" in names:
            _check_neighbors(kind, images, settings.neighbors)
    if "is" in names and not logits:
        raise ValueError("metrics=[is] needs a feature extractor that gives class logits too")
    if "is" in names and generated < settings.is_splits:
        raise ValueError(
            f"is_splits is {settings.is_splits}, but there are only {generated} generated images"
        )


def _check_neighbors(kind: str, images: int, neighbors: int) -> None:
    if images <= neighbors:
        raise ValueError(
            f"prdc with {neighbors} neighbors needs more than {neighbors} {kind} images, "
            f"there are {images}"
        )


def distances(
    names: Sequence[str],
    real: FeatureSet,
    generated: FeatureSet,
    settings: DistanceSettings | None = None,
) -> dict[str, float]:
    """The metrics asked for, by name.

    Args:
        names: some of ``METRICS``.
        real: features of data images.
        generated: features of samples.
        settings: None takes the customary values.

    Returns:
        ``fid``; ``kid`` and ``kid_std`` (over subsets); ``precision``, ``recall``, ``density``,
        ``coverage``; ``inception_score`` and ``inception_score_std`` (over parts).

    Raises:
        ValueError: an unknown name, too few images, or an extractor without logits.
    """
    settings = settings or DistanceSettings()
    check_possible(
        names, real.moments.count, generated.moments.count,
        logits=generated.logits is not None, settings=settings,
    )  # fmt: skip
    if real.moments.total.shape != generated.moments.total.shape:
        raise ValueError(
            f"{len(real.moments.total)} features of data images cannot be compared with "
            f"{len(generated.moments.total)} of samples"
        )
    found: dict[str, float] = {}
    if "fid" in names:
        found["fid"] = frechet_distance(real.moments, generated.moments)
    if "kid" in names:
        from torch_fidelity.metric_kid import kid_features_to_metric

        kid = kid_features_to_metric(
            _features(generated), _features(real), kid_subsets=settings.kid_subsets,
            kid_subset_size=settings.kid_subset_size, rng_seed=settings.seed, verbose=False,
        )  # fmt: skip
        found["kid"] = kid["kernel_inception_distance_mean"]
        found["kid_std"] = kid["kernel_inception_distance_std"]
    if "prdc" in names:
        found |= asdict(prdc(_features(real), _features(generated), settings.neighbors))
    if "is" in names:
        from torch_fidelity.metric_isc import isc_features_to_metric

        score = isc_features_to_metric(
            generated.logits, splits=settings.is_splits, shuffle=True, rng_seed=settings.seed
        )
        found["inception_score"] = score["inception_score_mean"]
        found["inception_score_std"] = score["inception_score_std"]
    return found


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, equation 6)."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def _features(images: FeatureSet) -> Tensor:
    if images.features is None:
        raise ValueError("kid and prdc need every image's features, not their moments alone")
    return images.features.to(torch.float32)


@dataclass(frozen=True)
class Prdc:
    """All between 0 and 1, but density, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, generated: Tensor, neighbors: int = 5) -> Prdc:
    """Precision, recall, density and coverage of generated images.

    Every real and every generated image has a ball that reaches to its k-th nearest neighbor of its
    own kind (Kynkaanniemi et al. 2019, equations 1 and 2; Naeem et al. 2020, equations 4 and 5):
    precision and recall ask which images fall into a ball of the other kind; density counts how
    many real balls a generated image falls into, coverage how many real balls hold a generated
    image.

    Args:
        real: ``(N, D)``.
        generated: ``(M, D)``.
        neighbors: k.

    Raises:
        ValueError: not more than k images of a kind.
    """
    _check_neighbors("real", len(real), neighbors)
    _check_neighbors("generated", len(generated), neighbors)
    # the expanded square cancels less around the origin
    center = real.mean(0)
    real, generated = real - center, generated - center
    real_radius, generated_radius = _radii(real, neighbors), _radii(generated, neighbors)
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
        density=in_real_balls / (neighbors * len(generated)),
        coverage=(nearest <= real_radius).double().mean().item(),
    )


def _radii(features: Tensor, neighbors: int) -> Tensor:
    # + 1: the nearest of all is the image itself
    radii = [
        _distances(rows, features).kthvalue(neighbors + 1, dim=1).values
        for rows in features.split(_ROWS)
    ]
    return torch.cat(radii)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, ``(A, B)``, by matrix products."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
