"""Adamax whose step the device can switch off.

torch's own Adamax decides on the host, so leaving a bad step out would mean waiting for the device
at every step. Here the decision is a tensor, as in torch's fused Adam: where ``found_inf`` is 1
nothing changes. Arithmetic and defaults are torch's (a test compares them), and the step count is
one tensor a group, not one a parameter.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Adamax(Optimizer):
    """Adam with the infinity norm (Kingma & Ba 2015, algorithm 2), in foreach operations.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the first moment and of the infinity norm.
        eps: added to \\|gradient\\| before the maximum is taken.
        weight_decay: added to the gradient, times the weight (L2).
    """

    found_inf: Tensor | None = None
    """0-d float tensor, set before a step: 1 leaves parameters and state as they are."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; the gradients are overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _state_of(self, parameters: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        for p in parameters:
            if not self.state[p]:
                for name in ("exp_avg", "exp_inf"):
                    self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return (
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_inf"] for p in parameters],
        )

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        averages, norms = self._state_of(parameters)
        weights: list[Tensor] = list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        beta1, beta2 = group["betas"]
        like = averages[0]
        if "step" not in group:
            group["step"] = torch.zeros((), dtype=torch.float64, device=like.device)
        group["step"] = step = group["step"].to(like.device)
        taken = torch.ones_like(step) if self.found_inf is None else 1 - self.found_inf.to(step)
        if self.found_inf is not None:
            # 0 times a NaN is a NaN: what is left out must be finite first
            switch = taken.bool()
            for gradient in gradients:
                gradient.copy_(torch.where(switch, gradient, 0.0))
        step += taken
        if group["weight_decay"]:
            torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
        # m <- m + (1 - beta1) (g - m), where the step is taken
        change = torch._foreach_sub(gradients, averages)
        torch._foreach_mul_(change, ((1 - beta1) * taken).to(like.dtype))
        torch._foreach_add_(averages, change)
        # u <- max(beta2 u, |g| + eps)
        torch._foreach_mul_(norms, (1 - (1 - beta2) * taken).to(like.dtype))
        torch._foreach_abs_(gradients)
        torch._foreach_add_(gradients, group["eps"])
        torch._foreach_mul_(gradients, taken.to(like.dtype))
        torch._foreach_maximum_(norms, gradients)
        # theta <- theta - lr / (1 - beta1^t) m / u; u is 0 only before the first step
        correction = 1 - torch.pow(torch.full_like(step, beta1), step)
        size = -group["lr"] * taken / correction.clamp_min(1 - beta1)
        update = torch._foreach_div(averages, torch._foreach_clamp_min(norms, 1e-30))
        torch._foreach_mul_(update, size.to(like.dtype))
        torch._foreach_add_(weights, list(update))
