"""The kernels' mathematics in plain PyTorch, op by op.

This is what the registered ops compute on the CPU, and on a GPU where a kernel does not compile.
Float64 stays float64; anything narrower is computed in float32 and rounded to its storage type at
the end, as in the kernels. Shapes and names as in :mod:`nvae.ops.kernels`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_CACHE = 1 << 20
"""Elements above which :func:`overlap_weight_gradient` loses the cache."""


def channel_sums(x: Tensor) -> Tensor:
    """Sum and sum of squares of every channel, ``(2, C)`` float64."""
    n = x.numel() // x.shape[1]
    mean, var = (t.double() for t in torch.batch_norm_update_stats(x.to(_wide(x)), None, None, 0.0))
    return n * torch.stack([mean, var + mean * mean])


def fold(dx: Tensor, x: Tensor, dsums: Tensor) -> Tensor:
    """Gradient of x from that of (x, channel_sums(x)): dx + dS1 + 2 dS2 x."""
    first, twice = torch.stack([dsums[0], 2 * dsums[1]])[:, None, :, None, None].to(_wide(x))
    return torch.addcmul(first, x.to(first.dtype), twice).add_(dx).to(x.dtype)


def moments(sums: Tensor, elements: Tensor | None, n: float, eps: float) -> Tensor:
    """Mean, 1 / sqrt(var + eps) and the biased variance, ``(3, C)`` float64."""
    mean, square = sums / (n if elements is None else elements)
    var = (square - mean * mean).clamp_min(0)
    return torch.stack([mean, (var + eps).rsqrt(), var])


def track(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, elements: Tensor | None,
    n: float, repeats: float, momentum: float,
) -> None:  # fmt: skip
    """Move running statistics ``(C,)`` in place towards a batch's mean and biased variance.

    The running variance is the unbiased one, of n (or ``elements``) times ``repeats`` elements.
    """
    count = repeats * (n if elements is None else elements)
    running_mean.lerp_(mean.to(running_mean), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)


def moments_backward(
    sums: Tensor, elements: Tensor | None, n: float, eps: float, dmean: Tensor, drstd: Tensor
) -> Tensor:
    """Gradient of the sums; a variance clamped at 0 passes none."""
    count = n if elements is None else elements
    mean, rstd, var = moments(sums, elements, n, eps)
    dvar = torch.where(var > 0, -0.5 * rstd**3 * drstd, 0.0)
    return torch.stack([dmean - 2 * mean * dvar, dvar]) / count


def bn_forward(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, *, swish: bool
) -> Tensor:
    """v or Swish(v), v = (x - mean) gamma rstd + beta."""
    if not swish:
        return _normalize(x, gamma, beta, mean, rstd)
    return F.silu(_normalize(x.to(_wide(x)), gamma, beta, mean, rstd)).to(x.dtype)


def bn_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, *, swish: bool
) -> tuple[Tensor, Tensor]:
    """dx (nothing through mean and rstd), and the sums ``(2, C)`` of g and of g (x - mean)."""
    g, stored = dy.to(x.dtype), x
    if swish:
        x = x.to(_wide(x))
        v = _normalize(x, gamma, beta, mean, rstd)
        g = torch.ops.aten.silu_backward(dy.to(v.dtype), v)
    gamma, mean, rstd = (t.to(_wide(x)) for t in (gamma, mean, rstd))
    # in evaluation mode: mean and variance are constants. By rows: on the CPU, images of two memory
    # formats give wrong gradients where the batch is 1
    dx, moment, total = torch.ops.aten.native_batch_norm_backward(
        _rows(g), _rows(x), gamma, mean, rstd**-2, None, None, False, 0.0, [True, True, True]
    )
    b, c, h, w = x.shape
    dx = dx.view(b, h, w, c).permute(0, 3, 1, 2).to(stored.dtype)
    return dx, torch.stack([total, moment / rstd]).double()


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


def _normalize(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """v = (x - mean) gamma rstd + beta, of x's type."""
    gamma, beta, mean, rstd = (t.to(_wide(x)) for t in (gamma, beta, mean, rstd))
    return F.batch_norm(x, mean, rstd**-2, gamma, beta, False, 0.0, 0.0)


def _rows(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B H W, C)``, a view of channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def small_map_applies(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether :func:`depthwise_conv2d_small_map` is the faster path for these tensors.

    PyTorch's own weight gradient walks over the padding: 24 ms for 16x1536x4x4 under a 5x5 kernel
    on one CPU core, forty times its forward pass; the sum of each tap's overlap takes 1.5 ms. On
    one core, forward and backward under a 5x5 kernel: 16x512x4x4 1.8 ms against 2.7 ms, but
    16x256x8x8 5.3 ms against 4.6 ms and 16x512x8x8 5.7 ms against 8.4 ms: with more overlap the
    gain needs more channels, and below it the calls cost more than they save.
    """
    kernel_size, side = weight.shape[2], max(x.shape[2:])
    return (
        stride == 1
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and side < 2 * kernel_size
        and (1 << 17 if side < kernel_size else 1 << 19) <= x.numel() < _CACHE
    )


def depthwise_conv2d_small_map(x: Tensor, weight: Tensor) -> Tensor:
    """Stride 1, "same" zero padding: ``(B, C, H, W)`` and ``(C, 1, K, K)`` to ``(B, C, H, W)``."""
    return _SmallMap.apply(x, weight)


class _SmallMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_x, _ = depthwise_backward(grad, x, weight, 1, True, False)
        return grad_x, overlap_weight_gradient(x, grad, weight.shape[2])


def overlap_weight_gradient(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """sum_{b,h,w} x[b, c, h + i - p, w + j - p] grad[b, c, h, w] for every tap (i, j).

    Args:
        x: ``(B, C, H, W)``.
        grad: ``(B, C, H, W)``.
        kernel_size: K, odd; p = K // 2.

    Returns:
        ``(C, 1, K, K)``.
    """
    channels = x.shape[1]
    x, grad = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    rows, columns = _overlaps(x.shape[1], kernel_size), _overlaps(x.shape[2], kernel_size)
    taps = x.new_zeros(kernel_size, kernel_size, channels)
    for i, (in_rows, out_rows) in rows.items():
        for j, (in_columns, out_columns) in columns.items():
            product = x[:, in_rows, in_columns] * grad[:, out_rows, out_columns]
            torch.sum(product.reshape(-1, channels), 0, out=taps[i, j])
    return taps.permute(2, 0, 1).unsqueeze(1).contiguous()


def _overlaps(size: int, kernel_size: int) -> dict[int, tuple[slice, slice]]:
    """For each tap along one axis that touches the image: its input range and output range."""
    padding = kernel_size // 2
    overlaps = {}
    for tap in range(kernel_size):
        start, stop = max(0, padding - tap), min(size, size + padding - tap)
        if start < stop:
            shift = tap - padding
            overlaps[tap] = (slice(start + shift, stop + shift), slice(start, stop))
    return overlaps
