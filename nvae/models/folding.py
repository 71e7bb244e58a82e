"""Normalizations folded into convolutions, for evaluation without gradients.

With running statistics a BN is an affine map per channel, so a mobile convolution needs none of
its four: the maps go into the neighboring weights. A weight-normalized convolution becomes a plain
one with the normalized weight. What is folded is kept while nothing that it came from changes.

On a GPU that runs the kernels, depthwise convolutions go through them here too, since cuDNN's are
the slowest of a pass; what is folded on the CPU is made of PyTorch's own operations alone.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.ops import depthwise_conv2d
from nvae.ops.library import Impl, will_take

T = TypeVar("T")


@runtime_checkable
class Foldable(Protocol):
    """A layer that has a cheaper equal in evaluation."""

    def folded(self) -> nn.Module:
        """The equal: fixed weights, none of this layer's parameters."""
        ...


def fold(module: nn.Module) -> nn.Module:
    """Put its equal in the place of every :class:`Foldable` layer inside ``module``."""
    for name, child in module.named_children():
        if isinstance(child, Foldable):
            setattr(module, name, child.folded())
        else:
            fold(child)
    return module


def fixed_conv(
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    kernels: Impl = "reference",
) -> nn.Conv2d:
    """A convolution with the given weight ``(out, in / groups, kh, kw)`` and bias ``(out,)``.

    Args:
        weight: fixed, as is the bias.
        bias: or None.
        stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`.
        kernels: whether it may run as a kernel of ours; depthwise ones without a bias do.
    """
    out_channels, in_channels, *kernel = weight.shape
    is_depthwise = groups == out_channels > 1 and in_channels == 1 and bias is None
    is_same = dilation == 1 and kernel == [2 * padding + 1] * 2
    fits = is_depthwise and is_same and will_take(kernels, weight)
    conv = (_DepthwiseKernel if fits else _FixedConv2d)(
        in_channels * groups, out_channels, (kernel[0], kernel[1]), stride, padding, dilation,
        groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


def evaluated_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int,
    groups: int,
) -> Tensor:  # fmt: skip
    """:func:`torch.nn.functional.conv2d` in evaluation; a 1x1 convolution on the CPU as a product.

    The product takes and gives channels_last, and what follows it stays in that layout, which is
    the faster one for depthwise convolutions too. For a single image oneDNN would pack the weights
    at every call. Neither with gradients nor while something is being traced: a compiler or an
    exported program chooses for itself.
    """
    is_pointwise = weight.shape[2:] == (1, 1) and stride == groups == 1 and padding == 0
    if (
        is_pointwise
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    ):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class _FixedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return evaluated_conv2d(
            x, self.weight, self.bias, self.stride[0], int(self.padding[0]), self.dilation[0],
            self.groups,
        )  # fmt: skip


class _DepthwiseKernel(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.stride[0])


class Derived(Generic[T]):
    """Holds what was derived last, together with the versions of what it was derived from.

    Never stored in a checkpoint; made anew when a source was written to or replaced. Fused
    optimizers write without counting a version, so a training pass forgets the value; that also
    frees its memory. Whoever writes through `.data` has to call :func:`forget`.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] | None = None
        self._value: T | None = None

    def usable(self, training: bool) -> bool:
        """Whether derived weights may be used: evaluation, no gradients, nothing being traced."""
        if torch.compiler.is_compiling():
            return False
        if training or torch.is_grad_enabled():
            self.clear()
            return False
        return True

    def get(self, sources: Iterable[Tensor], derive: Callable[[], T]) -> T:
        """``derive()``, or its last result if no source has changed since."""
        sources = tuple(sources)
        if any(source.is_inference() for source in sources):
            return derive()  # tensors made in inference mode do not count their versions
        key = tuple((source.data_ptr(), source._version) for source in sources)
        if key != self._key or self._value is None:
            # weights in full precision whatever the pass runs in: others will reuse them
            with torch.autocast(sources[0].device.type, enabled=False):
                self._key, self._value = key, derive()
        return self._value

    def clear(self) -> None:
        """Forget the value."""
        self._key = self._value = None


def forget(module: nn.Module) -> None:
    """Clear all that was derived inside ``module``, whose tensors were written through `.data`."""
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, Derived):
                value.clear()
