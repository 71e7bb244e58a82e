"""Feature extractors that tests name as `module:attribute`."""

import torch
from torch import Tensor, nn


def mean_and_spread(images: Tensor) -> Tensor:
    """Two numbers an image: (B, C, H, W) uint8 to (B, 2)."""
    pixels = images.float().flatten(1) / 255
    return torch.stack([pixels.mean(1), pixels.std(1)], dim=1)


class Rows(nn.Module):
    """Row means as features and as logits of eight classes."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.float().mean((1, 3)) / 255
        return rows, 5 * rows


def shapeless(images: Tensor) -> Tensor:
    return images.float()


NOT_A_FUNCTION = 3


class Weighted(nn.Module):
    """Features that depend on random weights, and a scalar buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2).to(torch.bfloat16)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)[:, :4].to(torch.bfloat16)) * self.scale


class Callable:
    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)


CALLABLE = Callable()


class Plain:
    """Cannot be called once made."""


class Needy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


def broken(images: Tensor) -> Tensor:
    return images / (1 // 0)


def not_finite(images: Tensor) -> Tensor:
    return torch.full((len(images), 2), torch.nan)


def three(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return images, images, images


def wrong_logits(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.float().flatten(1), images
