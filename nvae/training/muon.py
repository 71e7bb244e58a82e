"""Muon: steps along the orthogonalized momentum (Jordan et al. 2024), and Adamax for the rest.

A weight matrix is moved by an orthogonal matrix, the nearest to its momentum: all directions that
the gradients agree on are followed at the same pace, also those in which they are small. torch's
Muon takes matrices alone and leaves convolutions and everything else to a second optimizer; here
one optimizer, with one learning rate, moves a whole network.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nvae.training.optimizers import Adamax

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic iteration in Jordan's description of Muon: singular values end near 1, fast."""
TINY = 1e-7


class Muon(Adamax):
    """Orthogonalized momentum for matrices, Adamax for all else; see :func:`is_matrix`.

    A matrix of r rows (output channels) and c columns moves by lr * sqrt(max(1, r / c)) times the
    nearest orthogonal matrix, so that it changes what it computes by about as much whatever its
    shape is (Jordan et al. 2024). Without weight decay: weight normalization and BN make most
    weights' lengths meaningless, and their growth lowers the effective rate.

    Args:
        params: parameters or groups.
        lr: learning rate of the matrices.
        momentum: decay of the matrices' momentum, which is Nesterov's.
        others: learning rate of all other parameters, divided by ``lr``.
        iterations: of Newton and Schulz.
        betas: of Adamax.
        eps: of Adamax.
        weight_decay: of Adamax.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.05,
        momentum: float = 0.95,
        others: float = 0.4,
        iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; allowed: 0 up to, not with, 1")
        if not others >= 0:
            raise ValueError(f"others is {others}; it must be 0 or more")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be at least 1")
        super().__init__(params, lr, betas, eps, weight_decay)
        own = {"momentum": momentum, "others": others, "iterations": iterations}
        self.defaults |= own
        for group in self.param_groups:
            group |= own

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        rest = [p for p in parameters if not is_matrix(p)]
        if rest:
            slower = group | {"lr": group["lr"] * group["others"]}
            super()._update(slower, rest)
            group["step"] = slower["step"]
        alike = defaultdict(list)
        for p in parameters:
            if is_matrix(p):
                alike[p.shape[0], p[0].numel(), p.device, p.dtype].append(p)
        for same in alike.values():
            self._move(group, same)

    @torch.no_grad()
    def _move(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        """One step of matrices of one shape, together."""
        momentum = group["momentum"]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        directions = orthogonalized(
            torch.stack([each.flatten(1) for each in ahead]), group["iterations"]
        )
        rows, columns = directions.shape[1:]
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        steps = [d.view(p.shape) for d, p in zip(directions, parameters, strict=True)]
        torch._foreach_add_(list(parameters), torch._foreach_mul(steps, -rate))


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter mixes channels, several into several.

    Weights of linear layers and of convolutions do, ``(out, in, ...)``; biases, gains, learned
    states, depthwise convolutions and those from or to a single channel do not.
    """
    return parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 1


def orthogonalized(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About the nearest orthogonal matrices, by Newton and Schulz's iteration.

    Singular values end between 0.7 and 1.2, which serves an optimizer as well as 1 does.

    Args:
        matrices: ``(N, rows, columns)``; orthogonal is what the shorter of the two sides can be.
        iterations: of the quintic polynomial.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + TINY)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x
