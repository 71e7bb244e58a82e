"""The ops as PyTorch knows them: ``torch.ops.nvae``.

Each has a kernel (CUDA), a formula (CPU, and CUDA where the kernel does not compile) and a fake
(shapes, for tracing). They have no autograd of their own: the functions in front of them do.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvae.ops import formulas, kernels
from nvae.ops.compiler import CompileError

LIBRARY = torch.library.Library("nvae", "DEF")
_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Warn, but not at every step."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def kernel_or_formula(
    name: str, kernel: Callable[..., Any], formula: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel; where it does not compile, a warning (once) and the formula."""

    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except CompileError as error:
            warn_once(name, f"{name} runs without its CUDA kernel: {error}")
            return formula(*args)

    return run


def _define(
    schema: str,
    kernel: Callable[..., Any],
    formula: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    def plain(*args: Any) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return formula(*args)

    name = f"nvae::{schema.partition('(')[0]}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel_or_formula(name, kernel, plain), "CUDA")
    LIBRARY.impl(name, plain, "CPU")
    torch.library.register_fake(name, fake, lib=LIBRARY)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _out(x: Tensor, stride: int) -> Tensor:
    b, c, h, w = x.shape
    return _like(x, b, c, (h + stride - 1) // stride, (w + stride - 1) // stride)


def _doubles(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64)


def _parameter(like: Tensor, gradient: Tensor) -> Tensor:
    """Kernels return float32 gradients; autograd wants the parameter's type."""
    return gradient.to(like.dtype)


_define(
    "channel_sums(Tensor x) -> Tensor",
    kernels.channel_sums,
    formulas.channel_sums,
    lambda x: _doubles(x, 2, x.shape[1]),
)
_define(
    "fold(Tensor dx, Tensor x, Tensor dsums) -> Tensor",
    kernels.fold,
    lambda dx, x, dsums: _nhwc(formulas.fold(dx, x, dsums)),
    lambda dx, x, dsums: _like(x, *x.shape),
)
_define(
    "moments(Tensor sums, Tensor? elements, float n, float eps) -> Tensor",
    kernels.moments,
    formulas.moments,
    lambda sums, elements, n, eps: _doubles(sums, 3, sums.shape[1]),
)
_define(
    "moments_backward(Tensor sums, Tensor? elements, float n, float eps, Tensor dmean, "
    "Tensor drstd) -> Tensor",
    kernels.moments_backward,
    formulas.moments_backward,
    lambda sums, *_: _doubles(sums, 2, sums.shape[1]),
)
_define(
    "bn_swish(Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd) -> Tensor",
    lambda x, *bn: kernels.bn_swish_forward(x, bn),
    lambda x, *bn: _nhwc(formulas.bn_swish(x, *bn)),
    lambda x, *bn: _like(x, *x.shape),
)


def _bn_swish_backward_kernel(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = kernels.bn_swish_backward(dy, x, (gamma, beta, mean, rstd))
    params, moments = kernels.bn_gradients(sums, gamma, rstd)
    return dx, _parameter(gamma, params), moments


def _bn_swish_backward_formula(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, sums = formulas.bn_swish_backward(dy, x, gamma, beta, mean, rstd)
    params, moments = formulas.bn_gradients(sums, gamma, rstd)
    return _nhwc(dx), params, moments


_define(
    "bn_swish_backward(Tensor dy, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    _bn_swish_backward_kernel,
    _bn_swish_backward_formula,
    lambda dy, x, gamma, *_: (
        _like(x, *x.shape),
        gamma.new_empty(2, x.shape[1]),
        _doubles(x, 2, x.shape[1]),
    ),
)
_define(
    "depthwise(Tensor x, Tensor weight, int stride) -> Tensor",
    lambda x, weight, stride: kernels.depthwise_forward(x, weight, stride)[0],
    lambda x, weight, stride: _nhwc(formulas.depthwise(x, weight, stride)),
    lambda x, weight, stride: _out(x, stride),
)


def _depthwise_backward_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx, dw, _ = kernels.depthwise_backward(dy, x, weight, stride, need_dx=need_dx, need_dw=need_dw)
    return dx, _parameter(weight, dw)


def _depthwise_backward_formula(*args: Any) -> tuple[Tensor, Tensor]:
    dx, dw = formulas.depthwise_backward(*args)
    return _nhwc(dx), dw.contiguous()


def _depthwise_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = _like(x, *x.shape) if need_dx else _like(x, 0, 1, 1, 1)
    return dx, weight.new_empty(weight.shape if need_dw else 0)


_define(
    "depthwise_backward(Tensor dy, Tensor x, Tensor weight, int stride, bool need_dx, "
    "bool need_dw) -> (Tensor, Tensor)",
    _depthwise_backward_kernel,
    _depthwise_backward_formula,
    _depthwise_backward_fake,
)


def _fused_kernel(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    stride: int, want_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bn = (gamma, beta, mean, rstd)
    return kernels.depthwise_forward(x, weight, stride, bn, want_sums)


def _fused_formula(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    stride: int, want_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = formulas.depthwise(formulas.bn_swish(x, gamma, beta, mean, rstd), weight, stride)
    return _nhwc(y), formulas.channel_sums(y) if want_sums else _doubles(x, 0)


def _fused_fake(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    stride: int, want_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _out(x, stride), _doubles(x, 2, x.shape[1]) if want_sums else _doubles(x, 0)


_define(
    "bn_swish_depthwise(Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, "
    "Tensor weight, int stride, bool want_sums) -> (Tensor, Tensor)",
    _fused_kernel,
    _fused_formula,
    _fused_fake,
)


def _fused_backward_kernel(
    dy: Tensor, y: Tensor, dsums: Tensor | None, x: Tensor, gamma: Tensor, beta: Tensor,
    mean: Tensor, rstd: Tensor, weight: Tensor, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dw, sums = kernels.depthwise_backward(
        dy, x, weight, stride, (gamma, beta, mean, rstd), None if dsums is None else (y, dsums)
    )
    params, moments = kernels.bn_gradients(sums, gamma, rstd)
    return dx, _parameter(gamma, params), moments, _parameter(weight, dw)


def _fused_backward_formula(
    dy: Tensor, y: Tensor, dsums: Tensor | None, x: Tensor, gamma: Tensor, beta: Tensor,
    mean: Tensor, rstd: Tensor, weight: Tensor, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy = dy if dsums is None else formulas.fold(dy, y, dsums)
    activation = formulas.bn_swish(x, gamma, beta, mean, rstd)
    da, dw = formulas.depthwise_backward(dy, activation, weight, stride, True, True)
    dx, sums = formulas.bn_swish_backward(da, x, gamma, beta, mean, rstd)
    params, moments = formulas.bn_gradients(sums, gamma, rstd)
    return _nhwc(dx), params, moments, dw.contiguous()


_define(
    "bn_swish_depthwise_backward(Tensor dy, Tensor y, Tensor? dsums, Tensor x, Tensor gamma, "
    "Tensor beta, Tensor mean, Tensor rstd, Tensor weight, int stride) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fused_backward_kernel,
    _fused_backward_formula,
    lambda dy, y, dsums, x, gamma, beta, mean, rstd, weight, stride: (
        _like(x, *x.shape),
        gamma.new_empty(2, x.shape[1]),
        _doubles(x, 2, x.shape[1]),
        weight.new_empty(weight.shape),
    ),
)
