"""Which implementation of an op runs."""

from typing import Literal, get_args

from torch import Tensor

Impl = Literal["auto", "reference", "cuda"]


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is one of :data:`Impl`."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")


def use_kernel(impl: Impl, *tensors: Tensor) -> bool:
    """Whether the CUDA kernels take these tensors. Filled in with the kernels."""
    check_impl(impl)
    if impl == "cuda":
        raise ValueError("impl='cuda': the kernels are not in yet")
    return False
