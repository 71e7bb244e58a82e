"""The kernels' mathematics in plain PyTorch, op by op.

They are what the registered ops compute on the CPU, and on a GPU where a kernel does not compile;
the forward ones are differentiable and make up the reference path. Float64 stays float64; anything
narrower is computed in float32 and rounded to its storage type at the end, as in the kernels.
Shapes and names as in :mod:`nvae.ops.kernels`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.ops.depthwise_cpu import depthwise_conv2d_small_map, small_map_applies


def channel_sums(x: Tensor) -> Tensor:
    """Sum and sum of squares of every channel, ``(2, C)`` float64."""
    wide = x.double()
    return torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])


def fold(dx: Tensor, x: Tensor, dsums: Tensor) -> Tensor:
    """Gradient of x from that of (x, channel_sums(x)): dx + dS1 + 2 dS2 x."""
    first, second = dsums[:, None, :, None, None].to(_wide(x))
    return (dx + first + 2 * second * x).to(x.dtype)


def moments(sums: Tensor, elements: Tensor | None, n: float, eps: float) -> Tensor:
    """Mean, 1 / sqrt(var + eps) and the biased variance, ``(3, C)`` float64."""
    mean, square = sums / (n if elements is None else elements)
    var = (square - mean * mean).clamp_min(0)
    return torch.stack([mean, (var + eps).rsqrt(), var])


def moments_backward(
    sums: Tensor, elements: Tensor | None, n: float, eps: float, dmean: Tensor, drstd: Tensor
) -> Tensor:
    """Gradient of the sums; a variance clamped at 0 passes none."""
    count = n if elements is None else elements
    mean, rstd, var = moments(sums, elements, n, eps)
    dvar = torch.where(var > 0, -0.5 * rstd**3 * drstd, 0.0)
    return torch.stack([dmean - 2 * mean * dvar, dvar]) / count


def bn_swish(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Swish(v), v = (x - mean) gamma rstd + beta."""
    return F.silu(_normalise(x, gamma, beta, mean, rstd)[0]).to(x.dtype)


def bn_swish_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx (nothing through mean and rstd), and the sums ``(2, C)`` of g and of g (x - mean)."""
    v, centred, scale = _normalise(x, gamma, beta, mean, rstd)
    s = torch.sigmoid(v)
    g = dy.to(v.dtype) * s * (1 + v * (1 - s))
    wide = g.double()
    sums = torch.stack([wide.sum((0, 2, 3)), (wide * centred).sum((0, 2, 3))])
    return (g * scale).to(x.dtype), sums


def bn_gradients(sums: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) in gamma's type and (dmean, drstd) in float64, each ``(2, C)``."""
    first, second = sums
    params = torch.stack([rstd * second, first]).to(gamma.dtype)
    return params, torch.stack([-gamma * rstd * first, gamma * second]).double()


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Depthwise convolution, "same" padding."""
    weight = weight.to(x.dtype)
    if weight.requires_grad and small_map_applies(x, weight, stride):
        return depthwise_conv2d_small_map(x, weight)
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, weight.shape[0])


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """dx and dw; empty where not needed."""
    padding = weight.shape[-1] // 2
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy.to(x.dtype), x, weight.to(x.dtype), None, [stride] * 2, [padding] * 2, [1, 1], False,
        [0, 0], weight.shape[0], [need_dx, need_dw, False],
    )  # fmt: skip
    dx = x.new_empty(0, 1, 1, 1) if dx is None else dx
    return dx, weight.new_empty(0) if dw is None else dw.to(weight.dtype)


def normalise(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """v = (x - mean) gamma rstd + beta, in at least float32."""
    return _normalise(x, gamma, beta, mean, rstd)[0]


def _normalise(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """v, x - mean and gamma rstd, in at least float32."""
    dtype = _wide(x)
    gamma, beta, mean, rstd = (t.to(dtype).view(1, -1, 1, 1) for t in (gamma, beta, mean, rstd))
    centred, scale = x.to(dtype) - mean, gamma * rstd
    return centred * scale + beta, centred, scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
