"""What the reference implementation computed, in float64, with three small published models.

``NAME.checkpoint.pt`` is in the published format (optimizer state removed);
``NAME.expected.npz`` holds the numbers, logits at every ``logits_stride``-th row and column.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae.checkpoint import load_model
from nvae.models import NVAE

FOLDER = Path(__file__).parent
NAMES = ("mnist", "cifar10", "celeba64")


@dataclass(frozen=True)
class Reference:
    """A model in float64 and its expected numbers."""

    name: str
    model: NVAE
    expected: dict[str, np.ndarray]

    @property
    def x(self) -> Tensor:
        return torch.from_numpy(self.expected["x"]).double()

    def noise(self, prefix: str = "eps") -> list[Tensor]:
        groups = range(len(self.model.groups))
        return [torch.from_numpy(self.expected[f"{prefix}_{g:03d}"]).double() for g in groups]

    def thin(self, logits: Tensor) -> Tensor:
        stride = int(self.expected["logits_stride"])
        return logits[..., ::stride, ::stride]

    def assert_close(self, actual: Tensor, name: str, relative: float = 1e-9) -> None:
        """Largest deviation, relative to the largest expected value."""
        expected = np.asarray(self.expected[name], dtype=np.float64)
        values = actual.detach().numpy()
        assert values.shape == expected.shape, name
        error = np.abs(values - expected).max() / np.abs(expected).max()
        assert error < relative, f"{self.name} {name}: relative error {error:.2e}"


def checkpoint_path(name: str) -> Path:
    return FOLDER / f"{name}_small.checkpoint.pt"


def load_reference(name: str) -> Reference:
    expected = dict(np.load(FOLDER / f"{name}_small.expected.npz"))
    return Reference(name, load_model(checkpoint_path(name)).double(), expected)
