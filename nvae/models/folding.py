"""Normalizations folded into convolutions, for evaluation without gradients.

With running statistics a BN is an affine map per channel, so a mobile convolution needs none of
its four: the maps go into the neighboring weights. A weight-normalized convolution becomes a plain
one with the normalized weight. What is folded is kept while nothing that it came from changes.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

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
) -> nn.Conv2d:
    """A convolution with the given weight ``(out, in / groups, kh, kw)`` and bias ``(out,)``."""
    out_channels, in_channels, *kernel = weight.shape
    conv = nn.Conv2d(
        in_channels * groups, out_channels, (kernel[0], kernel[1]), stride, padding, dilation,
        groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


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
