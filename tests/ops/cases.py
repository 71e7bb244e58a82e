"""Random inputs of the ops and their float64 truth by autograd."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.ops.kernels import BatchNormVectors

EPS = 1e-5
ELEMENTS = 50.0
"""Of what a case is normalized by, whatever its shape."""


@dataclass(frozen=True)
class Case:
    """One convolution: input ``(b, c, h, w)``, kernel k, stride s, storage type, BN + Swish."""

    b: int
    c: int
    h: int
    w: int
    k: int = 5
    s: int = 1
    dtype: torch.dtype = torch.float32
    fused: bool = True

    def __str__(self) -> str:
        kind = "fused" if self.fused else "plain"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.b}x{self.c}x{self.h}x{self.w}-k{self.k}s{self.s}-{name}-{kind}"


@dataclass
class Problem:
    """Inputs of a case, and the truth in float64."""

    x: Tensor
    weight: Tensor
    bn: BatchNormVectors
    dy: Tensor
    dsums: Tensor
    y: Tensor
    sums: Tensor
    dx: Tensor
    dweight: Tensor
    dparams: Tensor  # gamma, beta
    through: Tensor  # x's sums, through the moments


def make_problem(case: Case, seed: int = 0) -> Problem:
    """The loss is <y, dy> + <sums, dsums>; plain cases have no dsums."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    def image(*shape: int) -> Tensor:
        return normal(*shape).to(case.dtype).contiguous(memory_format=torch.channels_last)

    c = case.c
    x = image(case.b, c, case.h, case.w)
    weight = normal(c, 1, case.k, case.k) / case.k
    mean, rstd = normal(c).double() / 2, 0.5 + normal(c).double().abs()
    gamma, beta = 0.5 + normal(c).abs(), normal(c) / 2
    sums_x = ELEMENTS * torch.stack([mean, rstd**-2 - EPS + mean**2])
    out = -(-case.h // case.s), -(-case.w // case.s)
    dy = image(case.b, c, *out)
    dsums = normal(2, c).double() / 10 * (1.0 if case.fused else 0.0)

    leaves = [t.double().clone().requires_grad_() for t in (x, weight, gamma, beta, sums_x)]
    x64, w64, gamma64, beta64, sums64 = leaves
    moments = moments_of(sums64)
    activation = x64
    if case.fused:
        scale, shift, mean, rstd, _ = (t.view(1, -1, 1, 1) for t in (gamma64, beta64, *moments))
        activation = F.silu((x64 - mean) * rstd * scale + shift)
    y = F.conv2d(activation, w64, None, case.s, case.k // 2, 1, c)
    sums = torch.stack([y.sum((0, 2, 3)), y.square().sum((0, 2, 3))])
    loss = (y * dy).sum() + (sums * dsums).sum()
    dx, dw, dgamma, dbeta, through = torch.autograd.grad(
        loss, leaves, allow_unused=True, materialize_grads=True
    )
    return Problem(
        x, weight, (gamma, beta, moments.detach()), dy, dsums, y.detach(), sums.detach(), dx, dw,
        torch.stack([dgamma, dbeta]), through,
    )  # fmt: skip


def moments_of(sums: Tensor, n: float = ELEMENTS, eps: float = EPS) -> Tensor:
    """Mean, 1 / sqrt(var + eps) and var ``(3, C)`` of sums ``(2, C)``, differentiable."""
    mean, square = sums / n
    var = (square - mean * mean).clamp_min(0)
    return torch.stack([mean, (var + eps).rsqrt(), var])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error as a share of the largest value; infinite where got is not finite."""
    assert got.shape == want.shape
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    scale = want.abs().max().clamp_min(1e-30)
    return float((got.detach().double() - want.double()).abs().max() / scale)


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of the storage type, with a margin for float32 accumulation."""
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
