"""The kernels' mathematics in plain PyTorch, op by op.

This is what the registered ops compute on the CPU, and on a GPU where a kernel does not compile.
Float64 stays float64; anything narrower is computed in float32 and rounded to its storage type at
the end, as in the kernels. Shapes and names as in :mod:`nvae.ops.kernels`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_HAS_MACHINE_CODE = torch.backends.mkldnn.is_available() and (
    torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
)
"""Whether oneDNN makes code for a convolution of many groups, which else is a loop over them."""


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


def bn_forward(x: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, *, swish: bool) -> Tensor:
    """v or Swish(v), v = (x - mean) gamma rstd + beta."""
    mean, rstd, _ = moments
    if not swish:
        return _normalize(x, gamma, beta, mean, rstd)
    return F.silu(_normalize(x.to(_wide(x)), gamma, beta, mean, rstd)).to(x.dtype)


def bn_backward(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, *, swish: bool
) -> tuple[Tensor, Tensor]:
    """dx (nothing through the moments), and the sums ``(2, C)`` of g and of g (x - mean)."""
    mean, rstd, _ = moments
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


def bn_gradients(
    sums: Tensor, gamma: Tensor, moments: Tensor, elements: Tensor | None, n: float
) -> tuple[Tensor, Tensor]:
    """(dgamma, dbeta) in gamma's type and (dS1, dS2) in float64, each ``(2, C)``.

    Args:
        sums: of g and of g (x - mean), ``(2, C)``.
        gamma: ``(C,)``.
        moments: of the forward pass, ``(3, C)``.
        elements: number of elements that they are of, 0-d; or None.
        n: the same otherwise; 0: the moments are constants, and the second result is empty.
    """
    first, second = sums
    mean, rstd, var = moments
    params = torch.stack([rstd * second, first]).to(gamma.dtype)
    if elements is None and not n:
        return params, moments.new_empty(0)
    dmean, drstd = -gamma * rstd * first, gamma * second
    # a variance clamped at 0 passes no gradient
    dvar = torch.where(var > 0, -0.5 * rstd**3 * drstd, 0.0)
    through = torch.stack([dmean - 2 * mean * dvar, dvar]) / (n if elements is None else elements)
    return params, through


def depthwise(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Depthwise convolution, "same" padding."""
    weight = weight.to(x.dtype)
    if weight.requires_grad and correlation_applies(x, weight, stride):
        y: Tensor = _Depthwise.apply(x, weight)
        return y
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
    # F.batch_norm is this call, but in torch 2.11 it refuses an eps of 0
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, gamma, beta, mean, rstd**-2, False, 0.0, 0.0, cudnn)


def _rows(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B H W, C)``, a view of channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def correlation_applies(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether :func:`weight_gradient_by_correlation` is the faster path for these tensors.

    PyTorch's own takes up to thirty times its forward pass. One core with AVX-512, 5x5 kernels:
    16x768x8x8 2.5 ms instead of 8.0 ms, 16x1536x4x4 1.6 ms instead of 10.2 ms, 16x96x32x32 5.2 ms
    instead of 9.5 ms, 4x90x64x64 10.1 ms instead of 14.8 ms; under 3x3 kernels it is PyTorch's own
    that is faster.
    """
    return (
        _HAS_MACHINE_CODE
        and stride == 1
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and weight.shape[-1] >= 5
        and max(x.shape[2:]) <= 64
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        need_dx = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        dx = depthwise_backward(grad, x, weight, 1, True, False)[0] if need_dx else None
        return dx, weight_gradient_by_correlation(x, grad, weight.shape[2])


def weight_gradient_by_correlation(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """sum_{b,h,w} x[b, c, h + i - p, w + j - p] grad[b, c, h, w] for every tap (i, j).

    For one image and channel that is the image under its gradient as the kernel; all of them are
    the groups of one convolution, and the images are summed afterwards.

    Args:
        x: ``(B, C, H, W)``.
        grad: ``(B, C, H, W)``.
        kernel_size: K, odd; p = K // 2.

    Returns:
        ``(C, 1, K, K)``.
    """
    batch, channels, height, width = x.shape
    groups = batch * channels
    images = x.contiguous().view(1, groups, height, width)
    kernels = grad.contiguous().view(groups, 1, height, width)
    taps = F.conv2d(images, kernels, padding=kernel_size // 2, groups=groups)
    return taps.view(batch, channels, 1, kernel_size, kernel_size).sum(0)
