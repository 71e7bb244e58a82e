"""Latents on a lattice: z = mu_p + sigma_p k / 2^b with an integer k.

The lattice is the prior's, so that a decoder knows it before it knows the image; the posterior is
a Normal on the same integers. Its step is at most half of the posterior's sigma: b belongs to a
channel, and comes from the ratio of the two sigmas on some of the images. What coarser steps
change in the code length is of second order: the discretized posterior is broader by step^2 / 12,
and has the entropy of the broader one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvae.codec.coder import Stack
from nvae.models.distributions import Normal
from nvae.models.output import GroupSample

REACH = 16
"""The lattice ends this many of the prior's sigmas from its mean."""
FINEST = 12
"""Largest b."""
STEPS_A_SIGMA = 2.0
"""Lattice steps in a sigma of the posterior, at the least."""

_QUANTILE = 0.05
_MEAN_GRID = 256.0
_STD_GRID = 256.0
_TINY = 1e-30


@dataclass(frozen=True)
class Lattice:
    """Integers k in the place of a group's latents: z lies k / 2^b sigmas from the prior's mean.

    Attributes:
        bits: b of every channel, ``(L,)`` int64.
    """

    bits: Tensor

    @property
    def limit(self) -> int:
        """Largest \\|k\\|."""
        return int(REACH << int(self.bits.max()))

    @property
    def scale(self) -> Tensor:
        """2^b, ``(L, 1, 1)`` float64."""
        return torch.exp2(self.bits.double())[:, None, None]

    def z(self, k: Tensor, prior: Normal) -> Tensor:
        """Latents of integers ``(B, L, h, w)``, in the prior's type."""
        return prior.mean + prior.sigma * (k / self.scale).to(prior.mean.dtype)

    def under_prior(self, like: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of k under the prior, flat, as many as ``like`` has."""
        std = self.scale.expand(like.shape).reshape(-1).numpy()
        return np.zeros_like(std), std

    def under_posterior(
        self, prior: Normal, posterior: Normal
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of k under the posterior, flat, on coarse grids.

        The grids make most of what another processor may compute in the last digits equal.

        Raises:
            FloatingPointError: they are not finite.
        """
        sigma = prior.sigma.double().clamp(min=_TINY)
        mean = (posterior.mean.double() - prior.mean.double()) / sigma * self.scale
        std = posterior.sigma.double() / sigma * self.scale
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise FloatingPointError("the model's latent distributions are not finite numbers")
        limit = float(self.limit)
        mean = (mean.clamp(-2 * limit, 2 * limit) * _MEAN_GRID).round() / _MEAN_GRID
        mantissa, exponent = torch.frexp(std.clamp(1 / _STD_GRID, _STD_GRID * limit))
        std = torch.ldexp((mantissa * _STD_GRID).round() / _STD_GRID, exponent)
        return mean.reshape(-1).numpy(), std.reshape(-1).numpy()

    def pop_posterior(self, stack: Stack, prior: Normal, posterior: Normal) -> Tensor:
        """Draw k ``(B, L, h, w)`` int32 from the posterior, with the stack's bits.

        Raises:
            EmptyStackError: there are not enough of them.
        """
        k = stack.pop_gaussian(self.limit, *self.under_posterior(prior, posterior))
        stack.check_not_empty()
        return torch.from_numpy(k).view(prior.mean.shape)

    def push_posterior(self, stack: Stack, k: Tensor, prior: Normal, posterior: Normal) -> None:
        """Inverse of :meth:`pop_posterior`."""
        parameters = self.under_posterior(prior, posterior)
        stack.push_gaussian(k.reshape(-1).numpy(), self.limit, *parameters)

    def push_prior(self, stack: Stack, k: Tensor) -> None:
        """Code k ``(B, L, h, w)`` int32."""
        stack.push_gaussian(k.reshape(-1).numpy(), self.limit, *self.under_prior(k))

    def pop_prior(self, stack: Stack, like: Tensor) -> Tensor:
        """Inverse of :meth:`push_prior`; of the shape of ``like``."""
        k = stack.pop_gaussian(self.limit, *self.under_prior(like))
        return torch.from_numpy(k).view(like.shape)


def fitting(groups: Sequence[GroupSample], steps: float = STEPS_A_SIGMA) -> list[Lattice]:
    """One lattice a group, for posteriors like those of some images."""
    return [Lattice(_bits(ratio_of(group), steps)) for group in groups]


def ratio_of(group: GroupSample) -> Tensor:
    """The posterior's sigma over the prior's, ``(B, L, h, w)`` float64."""
    assert group.posterior is not None
    return group.posterior.sigma.double() / group.prior.sigma.double().clamp(min=_TINY)


def _bits(ratio: Tensor, steps: float) -> Tensor:
    narrow = ratio.transpose(0, 1).flatten(1).quantile(_QUANTILE, dim=1)
    wanted = torch.log2(steps / narrow.clamp(min=_TINY)).ceil()
    return wanted.clamp(0, FINEST).to(torch.int64)


def bits_to_draw(groups: Sequence[GroupSample], lattices: Sequence[Lattice]) -> Tensor:
    """About how many bits a draw of an image's latents takes from the stack, ``(B,)``."""
    e = 17.08  # 2 pi e: a Normal's entropy is log2(std sqrt(2 pi e))
    return torch.stack(
        [
            torch.log2(1 + (ratio_of(group) * lattice.scale) * e**0.5).flatten(1).sum(1)
            for group, lattice in zip(groups, lattices, strict=True)
        ]
    ).sum(0)
