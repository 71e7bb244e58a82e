"""Whether a device runs the kernels: one of them is compiled, loaded, launched and checked."""

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nvae.command_line import brief
from nvae.ops import kernels, reference
from nvae.ops.cuda import Launcher

OLDEST_ARCH = 80
TOLERANCE = 1e-3


def find_fault(device: torch.device, launcher: Launcher = kernels.CUDA) -> str | None:
    """What keeps the kernels from running on ``device``, in one line; None: nothing.

    Args:
        device: where tensors of the launcher live.
        launcher: where to run.
    """
    try:
        arch = launcher.limits(device).arch
        if arch < OLDEST_ARCH:
            return f"compute capability {arch / 10} is below {OLDEST_ARCH / 10}"
        # a compiler that traces with tensors without storage may be asking
        with _disable_current_modes(), torch.no_grad():
            worst = _worst_difference(device, launcher)
    except Exception as error:  # whatever it is, the formulas work without the kernels
        return brief(error) or type(error).__name__
    if worst <= TOLERANCE:  # a NaN is not
        return None
    return (
        f"a kernel gave a wrong result (off by {worst:g}): please report it, with the GPU, its "
        "driver and torch's version"
    )


def _worst_difference(device: torch.device, launcher: Launcher) -> float:
    """Of batch normalization and Swish by kernel and by formula, one launch."""
    to: dict[str, Any] = {"dtype": torch.float32, "device": device}
    x = torch.linspace(-3, 3, 2 * 8 * 3 * 3, **to).view(2, 8, 3, 3)
    gamma, beta = torch.linspace(0.5, 2, 8, **to), torch.linspace(-1, 1, 8, **to)
    bn = (gamma, beta, torch.stack([beta, gamma, gamma]).double())
    found = kernels.bn_forward(x, bn, True, launcher)
    wanted = reference.bn_forward(x, *bn, swish=True)
    return float((found - wanted).abs().max())  # which waits for the device
