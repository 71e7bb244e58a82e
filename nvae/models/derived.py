"""Weights derived from parameters, kept between calls while nothing they came from changes."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Derived(Generic[T]):
    """Holds what was derived last, together with the versions of what it was derived from.

    Never stored in a checkpoint; made anew when a source was written to or replaced. Fused
    optimisers write without counting a version, so a training pass forgets the value; that also
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
