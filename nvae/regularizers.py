"""Spectral regularisation and its companion for batch normalisation (paper, section 3.2).

The KL between a deep posterior and prior is only bounded if the encoder is Lipschitz: the largest
singular value of every convolution is penalised, and the largest |gamma| of every BN.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models.layers import SpectralConv, weight_scale
from nvae.models.norm import BatchNorm


class SpectralNorm(nn.Module):
    """Sum of the largest singular values of all convolutions, by power iteration.

    Convolutions of one matrix shape are stacked and iterated together, so the cost is a few
    batched products whatever the depth. The singular vectors are buffers: they are saved, and a
    resumed run goes on with converged ones.

    Args:
        convs: the model's convolutions; squeeze-and-excitation is no convolution here.
        iterations: power iterations per call.
        warmup_iterations: at the first call, from random vectors. The published model takes 40,
            which leaves up to 0.3 % of the sum; 100 leave less than 0.05 %, once per run.
    """

    started: Tensor

    def __init__(
        self, convs: Iterable[SpectralConv], iterations: int = 4, warmup_iterations: int = 100
    ) -> None:
        super().__init__()
        self.iterations, self.warmup_iterations = iterations, warmup_iterations
        # a plain list: the convolutions belong to the model, not to this module
        self._convs = list(convs)
        counts: dict[tuple[int, int, bool], int] = defaultdict(int)
        for shape, _ in self._matrices():
            counts[shape] += 1
        like = self._convs[0].weight
        self._shapes = sorted(counts)
        for shape in self._shapes:
            rows, _, _ = shape
            # a fixed seed: every rank iterates from the same vectors
            start = torch.Generator().manual_seed(rows)
            u = torch.randn(counts[shape], rows, generator=start, dtype=like.dtype).to(like.device)
            self.register_buffer(self._name(shape), F.normalize(u, dim=1))
        self.register_buffer("started", torch.tensor(False, device=like.device))
        self._warm: bool | None = None

    @staticmethod
    def _name(shape: tuple[int, int, bool]) -> str:
        rows, columns, normalized = shape
        return f"u_{rows}x{columns}{'_wn' if normalized else ''}"

    def _matrices(self):  # type: ignore[no-untyped-def]
        for conv in self._convs:
            for matrix in conv.spectral_matrices():
                yield (*matrix.weight.shape, matrix.log_gain is not None), matrix

    def forward(self) -> Tensor:
        """The sum, a differentiable scalar. In training mode the vectors are advanced."""
        by_shape = defaultdict(list)
        for shape, matrix in self._matrices():
            by_shape[shape].append(matrix)
        iterations = self._next_iterations()
        total = []
        for shape in self._shapes:
            matrices = by_shape[shape]
            weight = torch.stack([m.weight for m in matrices])  # (N, out, in)
            gains = [m.log_gain for m in matrices if m.log_gain is not None]
            scale = weight_scale(weight, torch.stack(gains)) if gains else None
            u: Tensor = getattr(self, self._name(shape))
            v = power_iteration(weight.detach(), _detach(scale), u, iterations)
            # sigma = u^T diag(scale) W v, with u and v held fixed; u is overwritten at the next call
            rows = u.clone() if scale is None else u.clone() * scale
            total.append(torch.einsum("no,noi,ni->", rows, weight, v))
        return torch.stack(total).sum()

    def _next_iterations(self) -> int:
        if self._warm is None:  # read the flag from the device once
            self._warm = bool(self.started)
        iterations = self.iterations if self._warm else self.warmup_iterations
        if not self._warm:
            self.started.fill_(True)
            self._warm = True
        return iterations


def _detach(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


@torch.no_grad()
def power_iteration(weight: Tensor, scale: Tensor | None, u: Tensor, iterations: int) -> Tensor:
    """Advance left singular vectors in place and return the right ones.

    Args:
        weight: ``(N, out, in)``.
        scale: ``(N, out)`` factor of the rows, or None.
        u: ``(N, out)``, unit vectors; overwritten.
        iterations: at least 1.

    Returns:
        ``(N, in)`` unit vectors v.
    """
    transposed = weight.transpose(1, 2)
    for _ in range(iterations):
        rows = u if scale is None else u * scale
        v = F.normalize(torch.bmm(transposed, rows.unsqueeze(2)), dim=1)
        left = torch.bmm(weight, v).squeeze(2)
        u.copy_(F.normalize(left if scale is None else left * scale, dim=1))
    return v.squeeze(2)


def batchnorm_penalty(norms: Iterable[BatchNorm]) -> Tensor:
    """Sum over all BN layers of max |gamma|, a differentiable scalar."""
    by_width: dict[int, list[Tensor]] = defaultdict(list)
    for norm in norms:
        by_width[norm.weight.numel()].append(norm.weight)
    largest = [torch.stack(gammas).abs().amax(1).sum() for gammas in by_width.values()]
    return torch.stack(largest).sum()


def spectral_convs(model: nn.Module) -> list[SpectralConv]:
    """Every convolution that the penalty counts, in the model's order."""
    return [module for module in model.modules() if isinstance(module, SpectralConv)]


def batchnorms(model: nn.Module) -> list[BatchNorm]:
    """Every batch normalisation, in the model's order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
