"""The processes of a run: how many there are, how they meet, and what the first of them decides.

Were each to look for itself, they could see a shared folder at different moments, or different
devices, and go separate ways. Processes that torchrun or SLURM starts meet first of all, and talk
through their process group; those that Lightning starts from the first, later on, find in their
environment what it has decided before.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from nvae.started import will_start_others
from nvae.training.ranks import on_first_rank

AUTO = "auto"

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Where torchrun, Lightning and SLURM say which of a run's processes this is."""


def count_processes(
    devices: int | str, num_nodes: int, accelerator: str, has_environment: bool = False
) -> tuple[int, int]:
    """Processes on each machine, and machines.

    Args:
        devices: processes on each machine. ``auto``: what torchrun or srun has started; else one
            for each GPU that torch sees, and one on the CPU.
        num_nodes: machines; with ``auto`` 1 is however many torchrun or srun has started on.
        accelerator: ``cpu`` | ``gpu``.
        has_environment: Lightning was given a plugin that knows the other machines.

    Raises:
        ValueError: several machines, but nothing has started processes on the others, or on
            another number of machines.
    """
    launched = _launched()
    if launched is None and num_nodes > 1 and not (has_environment or _knows_its_machine()):
        raise ValueError(
            f"trainer.num_nodes={num_nodes}, but this process was started alone: start it with "
            f"torchrun --nnodes {num_nodes} or srun --nodes {num_nodes}, or on every machine with "
            "MASTER_ADDR, MASTER_PORT and NODE_RANK set"
        )
    if isinstance(devices, int):
        return devices, num_nodes
    if launched is None:
        return (torch.cuda.device_count() if accelerator == "gpu" else 1), num_nodes
    processes, machines = launched
    if num_nodes not in (1, machines):
        raise ValueError(
            f"trainer.num_nodes={num_nodes}, but the run was started on {machines} machine(s)"
        )
    if processes % machines:
        raise ValueError(
            f"the run was started as {processes} processes on {machines} machines; every machine "
            "has to have as many"
        )
    return processes // machines, machines


def launcher_of_all() -> type[ClusterEnvironment] | None:
    """Lightning's name for torchrun or SLURM where they start all processes; None elsewhere."""
    kinds = (TorchElasticEnvironment, SLURMEnvironment)  # in Lightning's order
    return next((kind for kind in kinds if kind.detect()), None)


def _launched() -> tuple[int, int] | None:
    """Processes and machines of torchrun or srun."""
    given, launcher = os.environ, launcher_of_all()
    if launcher is TorchElasticEnvironment:
        processes = int(given["WORLD_SIZE"])
        return processes, -(-processes // int(given.get("LOCAL_WORLD_SIZE", processes)))
    if launcher is SLURMEnvironment:
        return int(given["SLURM_NTASKS"]), int(given.get("SLURM_NNODES", "1"))
    return None


def _knows_its_machine() -> bool:
    """Whether the user, or a launcher that Lightning knows, says which machine this is."""
    others = (LSFEnvironment, MPIEnvironment)
    has_rank = "NODE_RANK" in os.environ or "GROUP_RANK" in os.environ
    return ("MASTER_ADDR" in os.environ and has_rank) or any(kind.detect() for kind in others)


_HANDED_DOWN = "NVAE_DECISIONS"
"""Environment variable with the decisions so far, for the processes that Lightning starts."""


def is_started_by_launcher() -> bool:
    """Whether torchrun or SLURM starts all processes of the run."""
    return launcher_of_all() is not None


def is_first_process() -> bool:
    """Whether this is the run's first, so far as the environment says, before any of them talk."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def decided(name: str, decide: Callable[[], Any]) -> Any:
    """What ``decide`` gives in the first process, on every one; all of them have to call this.

    Args:
        name: of the decision.
        decide: gives plain types, as JSON has them.

    Raises:
        Exception: what it raises, in the first process.
        OtherRankError: in the others of a process group. Those that Lightning would start are not
            started then.
    """
    if dist.is_available() and dist.is_initialized():
        return on_first_rank(decide)
    if os.environ.get("LOCAL_RANK", "0") != "0" and _HANDED_DOWN in os.environ:
        return json.loads(os.environ[_HANDED_DOWN])[name]
    value = decide()
    before = json.loads(os.environ.get(_HANDED_DOWN, "{}"))
    os.environ[_HANDED_DOWN] = json.dumps(before | {name: value})
    will_start_others()
    return value
