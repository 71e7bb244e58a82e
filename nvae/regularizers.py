"""Spectral regularization and its companion for batch normalization (paper, section 3.2).

The KL between a deep posterior and prior is only bounded if the encoder is Lipschitz: the largest
singular value of every convolution is penalised, and the largest |gamma| of every BN.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from nvae.models.layers import SpectralConv, SpectralMatrix
from nvae.models.normalization import BatchNorm
from nvae.ops.weight_norm import NORM_EPS

Shape = tuple[int, int, bool]
"""Rows, columns, and whether the matrix is weight-normalized."""


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

    Attributes:
        started: saved; whether the vectors have converged.
        is_warm: the same, once it has been read from the device; None until then.
    """

    started: Tensor

    def __init__(
        self, convs: Iterable[SpectralConv], iterations: int = 4, warmup_iterations: int = 100
    ) -> None:
        super().__init__()
        self.iterations, self.warmup_iterations = iterations, warmup_iterations
        # a plain list: the convolutions belong to the model, not to this module
        self._convs = list(convs)
        counts: dict[Shape, int] = defaultdict(int)
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
        self.is_warm: bool | None = None

    @staticmethod
    def _name(shape: Shape) -> str:
        rows, columns, normalized = shape
        return f"u_{rows}x{columns}{'_wn' if normalized else ''}"

    def _matrices(self) -> Iterator[tuple[Shape, SpectralMatrix]]:
        for conv in self._convs:
            for matrix in conv.spectral_matrices():
                rows, columns = matrix.weight.shape
                yield (rows, columns, matrix.log_gain is not None), matrix

    def forward(self) -> Tensor:
        """The sum, a differentiable scalar; the vectors are advanced."""
        by_shape: dict[Shape, list[SpectralMatrix]] = defaultdict(list)
        for shape, matrix in self._matrices():
            by_shape[shape].append(matrix)
        iterations = self._next_iterations()
        sums = [self._sum_of_largest(shape, by_shape[shape], iterations) for shape in self._shapes]
        return torch.stack(sums).sum()

    def _sum_of_largest(
        self, shape: Shape, matrices: list[SpectralMatrix], iterations: int
    ) -> Tensor:
        weights = [m.weight for m in matrices]
        gains = [m.log_gain for m in matrices if m.log_gain is not None]
        u: Tensor = getattr(self, self._name(shape))
        with torch.no_grad():
            stacked = torch.stack(weights)  # (N, out, in)
            norm = torch.linalg.vector_norm(stacked, dim=2)
            scale = torch.stack(gains).exp() / (norm + NORM_EPS) if gains else None
            v = power_iteration(stacked, scale, u, iterations)
        # u is overwritten at the next call
        return _SigmaSum.apply(stacked, norm, scale, u.clone(), v, *weights, *gains)

    def _next_iterations(self) -> int:
        if self.is_warm is None:  # read the flag from the device once
            self.is_warm = bool(self.started)
        iterations = self.iterations if self.is_warm else self.warmup_iterations
        if not self.is_warm:
            self.started.fill_(True)
            self.is_warm = True
        return iterations


class _SigmaSum(torch.autograd.Function):
    """sum_n u_n^T diag(scale_n) W_n v_n with u and v held fixed, W and g differentiable.

    The gradient in closed form is one pass over the weights; through autograd it is several, and
    a copy of every stacked weight.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        stacked: Tensor,
        norm: Tensor,
        scale: Tensor | None,
        u: Tensor,
        v: Tensor,
        *weights_and_gains: Tensor,
    ) -> Tensor:
        rows = u if scale is None else u * scale
        per_row = rows * _rows_times(v, stacked.transpose(1, 2))  # (N, out); sums to sigma
        kept = (rows, v) if scale is None else (rows, v, stacked, norm, per_row)
        ctx.save_for_backward(*kept)
        return per_row.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, v, *normalized = ctx.saved_tensors  # type: ignore[attr-defined]
        outer, right = (grad * rows).unsqueeze(2), v.unsqueeze(1)
        if not normalized:
            return (None,) * 5 + (outer * right).unbind()
        stacked, norm, per_row = normalized
        # the scale falls as ||w|| grows: d scale / d w = -scale w / ((||w|| + eps) ||w||)
        tiny = torch.finfo(norm.dtype).tiny
        shrink = -grad * per_row / ((norm + NORM_EPS) * norm.clamp_min(tiny))
        # in place: memory that is new to the process costs a CPU more than the arithmetic
        grad_weight = (stacked * shrink.unsqueeze(2)).addcmul_(outer, right)
        return (None,) * 5 + grad_weight.unbind() + (grad * per_row).unbind()


def _rows_times(rows: Tensor, matrices: Tensor) -> Tensor:
    """``(N, k)`` times ``(N, k, m)``, ``(N, m)``.

    A row vector from the left: the batched product from the right with a column is five times
    slower on the CPU.
    """
    return torch.bmm(rows.unsqueeze(1), matrices).squeeze(1)


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
        v = F.normalize(_rows_times(u if scale is None else u * scale, weight), dim=1)
        left = _rows_times(v, transposed)
        u.copy_(F.normalize(left if scale is None else left * scale, dim=1))
    return v


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
    """Every batch normalization, in the model's order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]
