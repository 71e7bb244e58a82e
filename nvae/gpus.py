"""GPUs that are there but of no use: an error with the remedy, not a run on the CPU by mistake."""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia")
"""What NVIDIA's kernel driver says of itself and its GPUs."""

DEVICES = Path("/dev")


def is_gpu_usable(cpu: str) -> bool:
    """Whether torch sees a GPU.

    Args:
        cpu: the setting that asks for the CPU, for the message.

    Raises:
        ValueError: it sees none, but this process was given NVIDIA GPUs: one line with the remedy.
    """
    if torch.cuda.is_available():
        return True
    if _are_hidden() or not _are_there():
        return False
    raise ValueError(
        f"this machine has NVIDIA GPUs, but torch {torch.__version__} sees none ({_reason()}); "
        f"{_remedy()}, or set {cpu} to work on the CPU knowingly"
    )


def _are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names no GPU: CUDA stops at the first word that is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return re.fullmatch(r"\d+|(GPU|MIG)-.*", first) is None


def _are_there() -> bool:
    if DRIVER.is_dir():
        # a container without GPUs shows the host's driver, but has none of the devices
        listed = (DRIVER / "gpus").is_dir() and any((DRIVER / "gpus").iterdir())
        return listed and any(map(_can_be_opened, DEVICES.glob("nvidia[0-9]*")))
    return (DEVICES / "dxg").exists() and _are_listed()  # Windows' subsystem for Linux


def _can_be_opened(device: Path) -> bool:
    with suppress(OSError):  # SLURM gave it to another job
        os.close(os.open(device, os.O_RDWR))
        return True
    return False


def _are_listed() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
        return listed.stdout.startswith("GPU ")
    return False


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "it does not say why"


def _remedy() -> str:
    if torch.version.cuda is None:
        return "this build of torch has no CUDA: install one that has"
    return (
        f"this build of torch needs a driver for CUDA {torch.version.cuda}: update the driver, or "
        "install torch for an older CUDA"
    )
