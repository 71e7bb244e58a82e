"""Weights derived from parameters, kept between calls while nothing they came from changes."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def frozen(training: bool) -> bool:
    """Whether derived weights may be reused: evaluation, no gradients, nothing being traced."""
    return not (training or torch.is_grad_enabled() or torch.compiler.is_compiling())


class Derived(Generic[T]):
    """Holds what was derived last, together with the versions of what it was derived from.

    Never stored in a checkpoint; made anew when a source was written to or replaced.
    """

    def __init__(self) -> None:
        self._key: tuple[tuple[int, int], ...] | None = None
        self._value: T | None = None

    def get(self, sources: Iterable[Tensor], derive: Callable[[], T]) -> T:
        """``derive()``, or its last result if no source has changed since."""
        sources = tuple(sources)
        if any(source.is_inference() for source in sources):
            return derive()  # tensors made in inference mode do not count their versions
        key = tuple((source.data_ptr(), source._version) for source in sources)
        if key != self._key or self._value is None:
            self._key, self._value = key, derive()
        return self._value
