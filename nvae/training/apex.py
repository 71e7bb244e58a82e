"""NVIDIA apex's fused optimisers, where NVIDIA's apex is installed."""

import importlib
import importlib.util

import torch

from nvae.training.host_switch import HostSwitch

APEX_OPTIMIZERS = {"apex_fused_adam": "FusedAdam", "apex_fused_lamb": "FusedLAMB"}
_BUILD = (
    "build NVIDIA's: git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install --no-build-isolation ./apex (docker/Dockerfile does)"
)


def check_apex(name: str) -> None:
    """Whether an apex optimiser can be used here.

    Args:
        name: a key of ``APEX_OPTIMIZERS``, as in ``optimizer.name``.

    Raises:
        ValueError: there is no apex, it is PyPI's unrelated package of that name, it was built
            without its CUDA extension, or there is no GPU.
    """
    if importlib.util.find_spec("apex") is None:
        raise ValueError(
            f"optimizer.name={name} needs NVIDIA apex, which is not installed; {_BUILD}"
        )
    try:
        optimizers = importlib.import_module("apex.optimizers")
        getattr(optimizers, APEX_OPTIMIZERS[name])
    except (ImportError, AttributeError):
        raise ValueError(
            f"optimizer.name={name} needs NVIDIA apex, but the installed package named apex is "
            f"another one (PyPI's is unrelated): pip uninstall apex, then {_BUILD}"
        ) from None
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            f"optimizer.name={name} needs apex's CUDA extension (amp_C), which was not built; "
            f"{_BUILD}"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"optimizer.name={name} needs a GPU; on the CPU: adamax or adamw")


def apex_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimiser's class, made to honour ``found_inf``; see :func:`check_apex`."""
    optimizers = importlib.import_module("apex.optimizers")
    fused: type[torch.optim.Optimizer] = getattr(optimizers, APEX_OPTIMIZERS[name])
    return type(f"Switched{fused.__name__}", (HostSwitch, fused), {})
