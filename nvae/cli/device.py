"""Which device a command runs on, and with which arithmetic."""

import re

import torch

from nvae.host_memory import keep_freed_memory


def open_device(name: str, *, tf32: bool) -> torch.device:
    """The device called ``name``; ``auto`` takes a GPU where there is one.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tf32: allow the shorter mantissa of TF32 in matrix products and convolutions. It is fast
            and moves a likelihood in its fourth digit.

    Raises:
        ValueError: no such device here.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::([0-9]{1,6}))?", name)
    if not found:
        raise ValueError(f"device={name} is unknown; allowed: auto, cpu, cuda, cuda:N")
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index = int(found[1] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={name} is not here: torch sees {torch.cuda.device_count()} CUDA device(s); "
            "device=cpu works everywhere"
        )
    return torch.device("cuda" if found[1] is None else f"cuda:{index}")
