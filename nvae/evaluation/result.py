"""The result of a likelihood evaluation: means over images, for JSON and for a terminal."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvae.evaluation.records import ImageRecords
from nvae.models import HierarchicalVAE
from nvae.objective import LN2

ACTIVE_UNIT_NATS = 0.1
"""A latent channel is active if its KL, per image and summed over space, is larger."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def over_images(cls, values: NDArray[np.float64]) -> "Estimate":
        """The mean of values ``(N,)``; the error of a single one is infinite."""
        n = len(values)
        error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        return cls(float(values.mean()), error)

    def scaled(self, factor: float) -> "Estimate":
        """Both numbers in other units."""
        return Estimate(self.mean * factor, self.standard_error * factor)


@dataclass(frozen=True)
class ImportanceWeighted:
    """The bound with K draws.

    Attributes:
        samples: K.
        nll: -log p(x) or more, nats an image.
        bits_per_dim: the same in bits/dim.
        effective_samples: (sum w)^2 / sum w^2 of the weights, mean over images; 1 means that one
            draw decides, K that all weigh the same.
    """

    samples: int
    nll: Estimate
    bits_per_dim: Estimate
    effective_samples: float


@dataclass(frozen=True)
class EvaluationResult:
    """Likelihood of a data split; groups are listed coarsest first.

    Attributes:
        images: number of images.
        dimensions: pixels times channels that the likelihood counts.
        negative_elbo: -ELBO, nats an image.
        reconstruction: its part -log p(x | z).
        kl: its part KL(q || p).
        negative_elbo_bits_per_dim: -ELBO in bits/dim.
        kl_per_group: mean KL of every group, nats an image.
        active_units: active latent channels of every group (see ``ACTIVE_UNIT_NATS``).
        latent_channels: latent channels of every group.
        importance_weighted: one entry for every K, ascending.
    """

    images: int
    dimensions: int
    negative_elbo: Estimate
    reconstruction: Estimate
    kl: Estimate
    negative_elbo_bits_per_dim: Estimate
    kl_per_group: tuple[float, ...]
    active_units: tuple[int, ...]
    latent_channels: tuple[int, ...]
    importance_weighted: tuple[ImportanceWeighted, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Lines for a terminal."""
        lines = [
            f"{'images':24}{self.images:>12}",
            f"{'':24}{'nats':>12}{'+-':>9}{'bits/dim':>12}",
            _line("negative ELBO", self.negative_elbo, self.negative_elbo_bits_per_dim),
            _line("  reconstruction", self.reconstruction),
            _line("  KL", self.kl),
        ]
        for bound in self.importance_weighted:
            text = _line(f"NLL, K = {bound.samples}", bound.nll, bound.bits_per_dim)
            lines.append(f"{text}   effective samples {bound.effective_samples:.1f}")
        lines += ["", f"{'group (coarsest first)':24}{'KL nats':>12}{'active units':>15}"]
        lines += [
            f"{group:<24}{kl:>12.3f}{f'{active} of {channels}':>15}"
            for group, (kl, active, channels) in enumerate(
                zip(self.kl_per_group, self.active_units, self.latent_channels, strict=True)
            )
        ]
        return "\n".join(lines)


def _line(name: str, nats: Estimate, bits: Estimate | None = None) -> str:
    text = f"{name:24}{nats.mean:>12.3f}{nats.standard_error:>9.3f}"
    return text if bits is None else f"{text}{bits.mean:>12.4f}"


def summarize(
    records: ImageRecords, model: HierarchicalVAE, importance_samples: Sequence[int]
) -> EvaluationResult:
    """Means over images, in float64.

    Args:
        records: sorted by index.
        model: gives the dimensions.
        importance_samples: values of K, in the order of the records' columns.
    """
    kl = records.kl_per_channel.sum((1, 2))
    per_dimension = 1 / (LN2 * model.config.counted_pixels)
    negative_elbo = Estimate.over_images(records.reconstruction + kl)
    bounds = []
    for column, samples in enumerate(importance_samples):
        nll = Estimate.over_images(-records.log_evidence[:, column])
        bounds.append(
            ImportanceWeighted(
                samples=samples,
                nll=nll,
                bits_per_dim=nll.scaled(per_dimension),
                effective_samples=float(records.effective_samples[:, column].mean()),
            )
        )
    channels = records.kl_per_channel.mean(0)
    return EvaluationResult(
        images=len(records),
        dimensions=model.config.counted_pixels,
        negative_elbo=negative_elbo,
        reconstruction=Estimate.over_images(records.reconstruction),
        kl=Estimate.over_images(kl),
        negative_elbo_bits_per_dim=negative_elbo.scaled(per_dimension),
        kl_per_group=tuple(channels.sum(1).tolist()),
        active_units=tuple((channels > ACTIVE_UNIT_NATS).sum(1).tolist()),
        latent_channels=tuple(shape[0] for shape in model.latent_shapes),
        importance_weighted=tuple(bounds),
    )
