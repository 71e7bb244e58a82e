"""What one pass through a model gives: distributions and samples of every group, and the logits."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.models.distributions import Normal


@dataclass(frozen=True)
class GroupSample:
    """What one group did.

    Attributes:
        z: the latent that the decoder used, ``(B, L, h, w)``.
        prior: p(z_g | z_<g).
        posterior: q(z_g | z_<g, x) before the flow; None where nothing was encoded.
        posterior_sample: the draw before the flow; ``z`` itself without one.
        has_flow: z is the posterior's draw moved by a flow.
    """

    z: Tensor
    prior: Normal
    posterior: Normal | None = None
    posterior_sample: Tensor | None = None
    has_flow: bool = False

    @property
    def log_p(self) -> Tensor:
        """log p(z_g | z_<g) of every element, ``(B, L, h, w)``, in nats."""
        return self.prior.log_prob(self.z)

    @property
    def log_q(self) -> Tensor:
        """log q(z_g | z_<g, x) of every element, ``(B, L, h, w)``, in nats.

        The flow preserves volume: the density is that of the draw before it.
        """
        assert self.posterior is not None
        assert self.posterior_sample is not None
        return self.posterior.log_prob(self.posterior_sample)

    @property
    def kl(self) -> Tensor:
        """KL(q || p) of every element, ``(B, L, h, w)``, in nats.

        In closed form; with a flow the one-sample estimate log q - log p.
        """
        if self.has_flow:
            return self.log_q - self.log_p
        assert self.posterior is not None
        return self.posterior.kl(self.prior)


@dataclass
class Output:
    """One pass of images through the model; B images, G groups, coarsest first.

    Densities are worked out when asked for, so a training step pays for no more than it uses.

    Attributes:
        logits: parameters of the likelihood, ``(B, K, H, W)``.
        groups: posterior, prior and sample of every group.
    """

    logits: Tensor
    groups: tuple[GroupSample, ...]

    @cached_property
    def _kl_of_alike(self) -> list[tuple[list[int], Tensor]]:
        """Groups of one shape by their indices, N, and their KL of every channel, ``(N * B, L)``.

        Thirty groups one by one are a thousand small operations.
        """
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, group in enumerate(self.groups):
            assert group.posterior is not None
            tensors = group.z, group.prior.sigma, group.posterior.sigma
            layouts = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
            kinds = type(group.prior), type(group.posterior), group.has_flow
            alike[layouts, kinds].append(index)
        return [
            (indices, _one_after_another([self.groups[i] for i in indices]).kl.sum((2, 3)))
            for indices in alike.values()
        ]

    @cached_property
    def kl_per_channel(self) -> tuple[Tensor, ...]:
        """KL of every latent channel, one ``(B, L)`` a group, in nats."""
        return self._by_group(lambda kl: kl)

    def _by_group(self, of_alike: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        rows = {
            index: row
            for indices, kl in self._kl_of_alike
            for index, row in zip(indices, of_alike(kl).chunk(len(indices)), strict=True)
        }
        return tuple(rows[index] for index in range(len(self.groups)))

    @cached_property
    def kl_by_channel(self) -> Tensor:
        """:attr:`kl_per_channel` in one, ``(B, G, L)``; 0 beyond a narrower group's channels."""
        widest = max(kl.shape[1] for kl in self.kl_per_channel)
        padded = [F.pad(kl, (0, widest - kl.shape[1])) for kl in self.kl_per_channel]
        return torch.stack(padded, dim=1)

    @cached_property
    def kl_per_group(self) -> Tensor:
        """KL of every group, ``(B, G)``, in nats."""
        return torch.stack(self._by_group(lambda kl: kl.sum(1)), dim=1)

    @cached_property
    def log_q(self) -> Tensor:
        """log q(z | x) of the latents drawn, ``(B,)``, in nats."""
        return torch.stack([group.log_q.sum((1, 2, 3)) for group in self.groups]).sum(0)

    @cached_property
    def log_p(self) -> Tensor:
        """log p(z) of the latents drawn, ``(B,)``, in nats."""
        return torch.stack([group.log_p.sum((1, 2, 3)) for group in self.groups]).sum(0)


def _one_after_another(groups: Sequence[GroupSample]) -> GroupSample:
    """Groups of one shape as one group, its batch all their batches."""
    if len(groups) == 1:
        return groups[0]
    priors = [group.prior for group in groups]
    posteriors = [group.posterior for group in groups if group.posterior is not None]
    drawn = [g.posterior_sample for g in groups if g.posterior_sample is not None]
    return GroupSample(
        torch.cat([group.z for group in groups]),
        type(priors[0]).joined(priors),
        type(posteriors[0]).joined(posteriors),
        torch.cat(drawn) if groups[0].has_flow else None,
        groups[0].has_flow,
    )
