"""One step of Adamax over all parameters: a kernel of one pass, a way for the CPU, and the formula.

The kernel reads weight, gradient, moment and norm once and writes three of them once, for all
tensors in one launch; it finds them by a table of their addresses on the device. A moving average
of the weights goes along in the same pass. Learning rate, step count, the average's share and the
switch that leaves a bad step out are read from the device, so the host waits for nothing and a
captured step holds no constant.

On the CPU the formula's dozen passes would read every tensor from memory each time, and most
tensors are so small that the calls cost more than the work: :func:`adamax_cpu` goes piece by piece.

All functions take the arguments of ``torch.ops.nvae.adamax_`` and work in place:

- weights, gradients, averages (first moments) and norms (infinity norms), four lists of tensors of
  the same shapes; the formula and the CPU's way overwrite the gradients;
- step, 0-d float64, the steps taken before, counted up unless this one is left out;
- learning_rate, 0-d float64;
- switched_off, 0-d, 1 to leave everything as it is, or None;
- beta1 and beta2, decay of the first moment and of the infinity norm;
- eps, added to |gradient| before the maximum is taken;
- weight_decay, added to the gradient, times the weight;
- moving, the weights' moving averages, tensors like them; or empty;
- share, 0-d float64, 1 - the moving averages' decay; None where there are none.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nvae.ops.cuda import Launch, Launcher
from nvae.ops.kernels import CUDA
from nvae.ops.multi_tensor import block_table, is_laid_out_like

CHUNK = 8192
"""Elements of a block."""
THREADS = 256
PIECE = 1 << 16
"""Elements that the CPU works on at a time: weight, gradient and state stay in a core's cache."""
PACKED = 1 << 12
"""Elements up to which a tensor is packed together with others on the CPU."""
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
    moving: Sequence[Tensor] = (),
    share: Tensor | None = None,
    launcher: Launcher = CUDA,
) -> None:
    """Two launches: one thread works out the coefficients, then every tensor is updated.

    Tensors that are not float32, or not laid out in memory as their weights are, take the formula.
    """
    tensors = [*zip(weights, gradients, averages, norms, *[moving] * bool(moving), strict=True)]
    if not all(_is_taken(*row) for row in tensors):
        adamax_formula(
            weights, gradients, averages, norms, step, learning_rate, switched_off, beta1, beta2,
            eps, weight_decay, moving, share,
        )  # fmt: skip
        return
    device = step.device
    rows = tuple(
        (*(t.data_ptr() for t in row[:4]), row[0].numel(), *(t.data_ptr() for t in row[4:]))
        for row in tensors
    )
    table, chunks = block_table(device, rows, tuple(w.numel() for w in weights), CHUNK)
    coefficients = torch.empty(2, device=device)
    switch = None if switched_off is None else switched_off.float()
    for mode, blocks, arguments, scalars in (
        (0, 1, (step, learning_rate, switch, coefficients), struct.pack("d", beta1)),
        (
            1,
            len(chunks),
            (table, chunks, coefficients, share),
            struct.pack("4f", 1 - beta1, beta2, eps, weight_decay),
        ),
    ):
        macros = (
            ("ELEM", 32), ("VIO", 4), ("MODE", mode), ("MOVING", int(bool(mode and moving))),
            ("THREADS", THREADS), ("CHUNK", CHUNK),
        )  # fmt: skip
        launcher.launch(device, Launch("adamax", macros, blocks, THREADS, 0, arguments, scalars))
    increment_version([*weights, *averages, *norms, *moving, step])


def _is_taken(weight: Tensor, *others: Tensor) -> bool:
    return weight.dtype == torch.float32 and all(
        each.dtype == torch.float32 and is_laid_out_like(each, weight) for each in others
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
    moving: Sequence[Tensor] = (),
    share: Tensor | None = None,
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
    if share is not None:
        move(moving, weights, share * taken)


def move(averages: Sequence[Tensor], weights: Sequence[Tensor], share: Tensor) -> None:
    """Move averages by a share of the way that only the device knows, 0-d; 0 changes nothing.

    ``torch._foreach_lerp_`` takes such a share too, but by an operation for each tensor on a GPU.
    """
    change = torch._foreach_sub(list(weights), list(averages))
    torch._foreach_mul_(change, share.to(averages[0].dtype))
    torch._foreach_add_(list(averages), change)


def adamax_cpu(
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
    moving: Sequence[Tensor] = (),
    share: Tensor | None = None,
) -> None:
    """What :func:`adamax_formula` computes, bit for bit; the switch is read, since nothing waits.

    Large tensors are updated in pieces that stay in the cache. Small ones are copied together
    first, and their new values back. What is not laid out in memory as its weight is goes as it is.
    """
    if switched_off is not None and bool(switched_off):
        return
    step += 1
    correction = 1 - torch.pow(torch.full_like(step, beta1), step)
    size = float(-learning_rate / correction.clamp_min(1 - beta1))
    # 1 - (1 - beta2): as the formula rounds it
    numbers = size, 1 - beta1, 1 - (1 - beta2), eps, weight_decay
    small: list[list[Tensor]] = []
    for row in zip(weights, gradients, averages, norms, strict=True):
        flat = _in_memory_order(row)
        if flat is None:
            _update(*row, *numbers)
        elif len(flat[0]) <= PACKED:
            small.append(flat)
        else:
            _update_in_pieces(flat, *numbers)
    for dtype in {row[0].dtype for row in small}:
        columns = [*zip(*(row for row in small if row[0].dtype == dtype), strict=True)]
        packed = [torch.cat(column) for column in columns]
        _update_in_pieces(packed, *numbers)
        sizes = [len(weight) for weight in columns[0]]
        for index in (0, 2, 3):
            torch._foreach_copy_(columns[index], packed[index].split(sizes))
    if share is not None:
        move(moving, weights, share)


def _in_memory_order(row: tuple[Tensor, ...]) -> list[Tensor] | None:
    """Tensors of one shape as views ``(N,)``; None where types or layouts differ."""
    if any(each.dtype != row[0].dtype for each in row):
        return None
    if all(each.is_contiguous() for each in row):
        return [each.view(-1) for each in row]
    if all(each.is_contiguous(memory_format=torch.channels_last) for each in row):
        return [each.permute(0, 2, 3, 1).view(-1) for each in row]
    return None


def _update_in_pieces(flat: list[Tensor], *numbers: float) -> None:
    for piece in zip(*(each.split(PIECE) for each in flat), strict=True):
        _update(*piece, *numbers)


def _update(
    weight: Tensor, gradient: Tensor, average: Tensor, norm: Tensor,
    size: float, share: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    if weight_decay:
        gradient.add_(weight, alpha=weight_decay)
    scratch = gradient - average
    average.add_(scratch.mul_(share))
    norm.mul_(beta2)
    torch.maximum(norm, gradient.abs_().add_(eps), out=norm)
    torch.clamp_min(norm, TINY, out=scratch)
    torch.div(average, scratch, out=scratch)
    weight.add_(scratch.mul_(size))
