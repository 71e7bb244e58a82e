"""Which implementation of an op runs."""

from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from nvae.ops.compiler import CompileError, compile_kernel
from nvae.ops.kernels import DTYPES
from nvae.ops.library import warn_once
from nvae.ops.tiling import MAX_KERNEL

Impl = Literal["auto", "reference", "cuda"]
IMPLS: tuple[str, ...] = get_args(Impl)

OLDEST_ARCH = 80


def use_kernel(impl: Impl, x: Tensor, kernel_size: int = 1) -> bool:
    """Whether the CUDA kernels take this call.

    Args:
        impl: ``auto`` asks for a CUDA tensor that is channels_last already, of a type and size the
            kernels know; ``cuda`` converts the layout.
        x: ``(B, C, H, W)``, the op's input.
        kernel_size: K of the convolution.

    Raises:
        ValueError: an unknown ``impl``, or ``cuda`` where no kernel applies.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return False
    reason = _not_applicable(x, kernel_size)
    if reason is None:
        reason = _unavailable(x.device.index, impl == "auto")
    if impl == "cuda":
        if reason is not None:
            raise ValueError(f"impl='cuda' does not apply: {reason}")
        return True
    return reason is None and x.is_contiguous(memory_format=torch.channels_last)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x as a convolution under autocast would take it."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _not_applicable(x: Tensor, kernel_size: int) -> str | None:
    if x.device.type != "cuda" or torch.version.cuda is None:
        return f"the kernels need an NVIDIA GPU, the input is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if kernel_size > MAX_KERNEL:
        return f"kernel size {kernel_size} is above {MAX_KERNEL}"
    if x.numel() == 0:
        return "the input is empty"
    return None


def _unavailable(device: int, warn: bool) -> str | None:
    """Why a device has no kernels, or None. torch.compile runs it while tracing."""
    reason = _try(*torch.cuda.get_device_capability(device))
    if reason is not None and warn:
        warn_once("unavailable", f"CUDA kernels are off: {reason}")
    return reason


# what torch.compiler.assume_constant_result does, without its import of a second and a half
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _try(major: int, minor: int) -> str | None:
    """Compile the smallest kernel, once a process."""
    arch = 10 * major + minor
    if arch < OLDEST_ARCH:
        return f"compute capability {major}.{minor} is below {OLDEST_ARCH / 10}"
    try:
        macros = (("ELEM", 32), ("VIO", 1), ("MODE", 1), ("THREADS", 256), ("WIDE", 1))
        compile_kernel("vectors", macros, arch)
    except CompileError as error:
        return str(error)
    return None
