"""A term of one's own in the loss: latents whose posterior means decorrelate.

    PYTHONPATH=examples python train.py objective.name=own_objective:Decorrelated \
        +objective.options.weight=0.5
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from nvae.models import Output
from nvae.objective import Objective


class Decorrelated(Objective):
    """The ELBO, and a penalty on correlations between a group's latent channels."""

    defaults: ClassVar[dict[str, Any]] = {"weight": 0.1}
    capturable = True  # nothing in it changes from step to step, so a CUDA graph may hold it

    def extra_terms(self, output: Output, x: Tensor) -> dict[str, Tensor]:
        """``decorrelation``: the sum of squared covariances off the diagonal, times the weight."""
        total = x.new_zeros(())
        for group in output.groups:
            assert group.posterior is not None
            mean = group.posterior.mean.transpose(0, 1).flatten(1)  # (L, B h w)
            covariance = torch.cov(mean).reshape(len(mean), len(mean))
            total = total + (covariance - covariance.diag().diag()).square().sum()
        return {"decorrelation": self.options["weight"] * total}
