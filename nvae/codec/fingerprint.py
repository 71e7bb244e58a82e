"""What a decoder must have in common with the encoder: the model's weights, software, processor."""

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nvae.models import MODELS, HierarchicalVAE

_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"),
    *("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_ENABLE_INSTRUCTIONS"),
)
"""Of the environment; each chooses other arithmetic."""

_OF_CPUINFO = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")


def model_sha256(model: HierarchicalVAE) -> str:
    """SHA-256 of family, configuration and every tensor of a model, in hexadecimal."""
    kind = MODELS.name_of(type(model))
    digest = hashlib.sha256(json.dumps([kind, model.config.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().to("cpu").contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def software() -> dict[str, str]:
    """Versions of what computes."""
    return {"torch": torch.__version__, "constriction": _version("constriction")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The kind of processor, and what has been set about how it computes."""
    kind = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *_from_cpuinfo()]
    backends = torch.backends
    switches = [
        f"oneDNN {'on' if backends.mkldnn.is_available() and backends.mkldnn.enabled else 'off'}",
        f"float32 {torch.get_float32_matmul_precision()}",
    ]
    given = [f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    return ", ".join([*kind, *switches, *given])[:500]


def _from_cpuinfo() -> list[str]:
    """Two processors of one instruction set may still be given other kernels, by their caches."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    pairs = (line.partition(":") for line in lines)
    found = {key.strip(): value.strip() for key, _, value in pairs}
    return [f"{name} {found[name]}" for name in _OF_CPUINFO if name in found]
