"""One step of Adamax over all parameters: a kernel of one pass, and its formula in foreach calls.

The kernel reads weight, gradient, moment and norm once and writes three of them once, for all
tensors in one launch; it finds them by a table of their addresses on the device. Learning rate,
step count and the switch that leaves a bad step out are read from the device, so the host waits for
nothing and a captured step holds no constant.

Both functions take the arguments of ``torch.ops.nvae.adamax_`` and work in place:

- weights, gradients, averages (first moments) and norms (infinity norms), four lists of tensors of
  the same shapes; the formula overwrites the gradients;
- step, 0-d float64, the steps taken before, counted up unless this one is left out;
- learning_rate, 0-d float64;
- switched_off, 0-d, 1 to leave everything as it is, or None;
- beta1 and beta2, decay of the first moment and of the infinity norm;
- eps, added to |gradient| before the maximum is taken;
- weight_decay, added to the gradient, times the weight.
"""

import struct

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nvae.ops.cuda import Launch, Launcher
from nvae.ops.kernels import CUDA, block_table

CHUNK = 8192
"""Elements of a block."""
THREADS = 256
TINY = 1e-30
"""Takes the place of a norm of 0, which comes before the first step alone."""


def adamax_kernel(
    weights: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    norms: list[Tensor],
    step: Tensor,
    learning_rate: Tensor,
    switched_off: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    launcher: Launcher = CUDA,
) -> None:
    """Two launches: one thread works out the coefficients, then every tensor is updated.

    Tensors that are not float32, or not laid out in memory as their weights are, take the formula.
    """
    tensors = [*zip(weights, gradients, averages, norms, strict=True)]
    if not all(_is_taken(*row) for row in tensors):
        adamax_formula(
            weights, gradients, averages, norms, step, learning_rate, switched_off, beta1, beta2,
            eps, weight_decay,
        )  # fmt: skip
        return
    device = step.device
    rows = tuple((*(t.data_ptr() for t in row), row[0].numel()) for row in tensors)
    table, chunks = block_table(device, rows, tuple(w.numel() for w in weights), CHUNK)
    coefficients = torch.empty(2, device=device)
    switch = None if switched_off is None else switched_off.float()
    for mode, blocks, arguments, scalars in (
        (0, 1, (step, learning_rate, switch, coefficients), struct.pack("d", beta1)),
        (
            1,
            len(chunks),
            (table, chunks, coefficients),
            struct.pack("4f", 1 - beta1, beta2, eps, weight_decay),
        ),
    ):
        macros = (
            ("ELEM", 32), ("VIO", 4), ("MODE", mode), ("THREADS", THREADS), ("CHUNK", CHUNK),
        )  # fmt: skip
        launcher.launch(device, Launch("adamax", macros, blocks, THREADS, 0, arguments, scalars))
    increment_version([*weights, *averages, *norms, step])


def _is_taken(weight: Tensor, *others: Tensor) -> bool:
    return weight.dtype == torch.float32 and all(
        each.dtype == torch.float32 and each.stride() == weight.stride() for each in others
    )


def adamax_formula(
    weights: list[Tensor],
    gradients: list[Tensor],
    averages: list[Tensor],
    norms: list[Tensor],
    step: Tensor,
    learning_rate: Tensor,
    switched_off: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The same in torch's foreach calls; the arithmetic is that of ``torch.optim.Adamax``."""
    dtype = averages[0].dtype
    taken = torch.ones_like(step) if switched_off is None else 1 - switched_off.to(step)
    if switched_off is not None:
        # 0 times a NaN is a NaN: what is left out must be finite first
        switch = taken.bool()
        for gradient in gradients:
            gradient.copy_(torch.where(switch, gradient, 0.0))
    step += taken
    if weight_decay:
        torch._foreach_add_(gradients, weights, alpha=weight_decay)
    # m <- m + (1 - beta1) (g - m), where the step is taken
    change = torch._foreach_sub(gradients, averages)
    torch._foreach_mul_(change, ((1 - beta1) * taken).to(dtype))
    torch._foreach_add_(averages, change)
    # u <- max(beta2 u, |g| + eps)
    torch._foreach_mul_(norms, (1 - (1 - beta2) * taken).to(dtype))
    torch._foreach_abs_(gradients)
    torch._foreach_add_(gradients, eps)
    torch._foreach_mul_(gradients, taken.to(dtype))
    torch._foreach_maximum_(norms, gradients)
    # theta <- theta - lr / (1 - beta1^t) m / u
    correction = 1 - torch.pow(torch.full_like(step, beta1), step)
    size = -learning_rate * taken / correction.clamp_min(1 - beta1)
    update = torch._foreach_div(averages, torch._foreach_clamp_min(norms, TINY))
    torch._foreach_mul_(update, size.to(dtype))
    torch._foreach_add_(weights, list(update))
