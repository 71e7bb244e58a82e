"""Images that certainly do not belong, made from those that do."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvae.models.pixel_distribution import counted_window
from nvae.random import STREAM_NOISE, image_keys, uniform
from nvae.settings import Size, check_choice

CHANGES = ("inverted", "noise", "faded")


@dataclass(frozen=True)
class Synthetic:
    """A change of images ``(B, C, H, W)`` in [0, 1], within the window that the likelihood counts.

    Attributes:
        change: ``inverted``: 1 - x. ``noise``: every value of every channel is any of its levels,
            all equally likely. ``faded``: half as bright, level k becomes k // 2.
        bits: the levels are k / (2^bits - 1); None: any number in [0, 1].
        counted_size: of the window; None: the whole image.
        seed: of the noise, which also depends on the image's index.

    Raises:
        ValueError: an unknown change.
    """

    change: str
    bits: int | None
    counted_size: Size | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("change", self.change, CHANGES)

    def of(self, x: Tensor, index: Tensor) -> Tensor:
        """The images ``x`` ``(B, C, H, W)`` in [0, 1], changed. The noise of each depends on its
        ``index``, ``(B,)`` int64, in the split."""
        rows, columns = counted_window((x.shape[-2], x.shape[-1]), self.counted_size)
        inside = x[..., rows, columns]
        changed = x.clone()
        if self.change == "noise":
            inside = self._noise(inside, index)
        elif self.change == "inverted":
            inside = 1 - inside
        else:
            inside = self._faded(inside)
        changed[..., rows, columns] = inside
        return changed

    def _noise(self, like: Tensor, index: Tensor) -> Tensor:
        keys = image_keys(index.to(like.device), seed=self.seed, stream=STREAM_NOISE)
        u = uniform(keys, like.shape[1:], torch.float64)
        if self.bits is None:
            return u.to(like.dtype)
        levels = torch.floor(u * 2**self.bits).clamp(max=2**self.bits - 1)
        return (levels / (2**self.bits - 1)).to(like.dtype)

    def _faded(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return x / 2
        white = 2**self.bits - 1
        return torch.floor((x * white).round() / 2) / white
