"""What the authors' implementations of VDVAE and Efficient-VDVAE computed, in float64.

Slimmed copies of longer files:

- ``vdvae_small``: a 16x16 model with 5 bits and custom widths. Weights as they were (float32);
  logits of every 4th row and column beside the sums of all; posteriors and priors left out.
- ``evdvae_small``: a 16x16 model with 8 bits. Weights and noise are rounded to float32, half their
  size, so numbers agree to about 1e-6; logits of every 4th row and column and 5th channel.
- ``dmol_unit``: VDVAE's likelihood alone, every 6th of 512 pixels, all of its branches among them.

The models agree with the whole files to 1e-10.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvae.checkpoint import load_model
from nvae.models.very_deep import VeryDeepVAE
from tests.reference import FOLDER

NAMES = {"vdvae": "vdvae_small", "evdvae": "evdvae_small"}
TOLERANCE = {"vdvae": 1e-8, "evdvae": 1e-5}


class Numbers:
    """A model in float64 and its expected numbers."""

    def __init__(self, family: str) -> None:
        stem = FOLDER / NAMES[family]
        self.family = family
        self.checkpoint = stem.with_suffix(".checkpoint.pt")
        self.settings = stem.with_suffix(".json")
        self.expected = dict(np.load(stem.with_suffix(".expected.npz")))
        model = load_model(self.checkpoint, "raw", format=family, config=self.settings)
        assert isinstance(model, VeryDeepVAE)
        self.model = model.double()

    def noise(self, prefix: str = "eps") -> list[Tensor]:
        layers = range(self.model.num_groups)
        return [torch.from_numpy(self.expected[f"{prefix}_{i:03d}"]).double() for i in layers]

    def assert_close(self, actual: Any, name: str) -> None:
        assert_close(actual, self.expected[name], f"{self.family} {name}", TOLERANCE[self.family])


def assert_close(actual: Any, expected: NDArray[Any], name: str, relative: float = 1e-8) -> None:
    """Largest deviation, relative to the largest expected value."""
    values = actual.detach().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    assert values.shape == expected.shape, name
    error = np.abs(values - expected).max() / np.abs(expected).max()
    assert error < relative, f"{name}: relative error {error:.2e}"


def channels_first(images: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).double()


class Given:
    """Pixel randomness from a file."""

    def __init__(self, *uniforms: Tensor) -> None:
        self._uniforms = iter(uniforms)

    def uniform(self, like: Tensor) -> Tensor:
        u = next(self._uniforms)
        assert u.shape == like.shape
        return u

    def normal(self, like: Tensor) -> Tensor:
        raise AssertionError("a mixture of logistics draws no normals")
