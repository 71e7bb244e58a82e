"""Mean and covariance of features, as sums that add up over batches, processes and devices."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class FeatureMoments:
    """Sufficient statistics of a Gaussian, in float64; D features.

    Attributes:
        count: number of images.
        total: sum of the features, ``(D,)``.
        outer: sum of their outer products, ``(D, D)``.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, features: int) -> "FeatureMoments":
        """Of no image."""
        return cls(
            0,
            torch.zeros(features, dtype=torch.float64),
            torch.zeros(features, features, dtype=torch.float64),
        )

    def add(self, features: Tensor) -> None:
        """Count ``features`` ``(B, D)``."""
        x = features.detach().to("cpu", torch.float64)
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def pooled(self) -> "FeatureMoments":
        """The sum over all processes, on each of them."""
        count = torch.tensor(self.count)
        total, outer = self.total.clone(), self.outer.clone()
        for value in (count, total, outer):
            dist.all_reduce(value)
        return FeatureMoments(int(count), total, outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        """``(D,)``."""
        return (self.total / self.count).numpy()

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased, ``(D, D)``.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} image(s) have no covariance; at least 2 are needed")
        mean = self.total / self.count
        centred = self.outer - self.count * torch.outer(mean, mean)
        return (centred / (self.count - 1)).numpy()
