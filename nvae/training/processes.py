"""How many processes a run has: what the user says, what a launcher started, what torch sees."""

import os

import torch
from lightning_fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

AUTO = "auto"


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


def _launched() -> tuple[int, int] | None:
    """Processes and machines of torchrun or srun, in the order in which Lightning asks."""
    given = os.environ
    if TorchElasticEnvironment.detect():
        processes = int(given["WORLD_SIZE"])
        return processes, -(-processes // int(given.get("LOCAL_WORLD_SIZE", processes)))
    if SLURMEnvironment.detect():
        return int(given["SLURM_NTASKS"]), int(given.get("SLURM_NNODES", "1"))
    return None


def _knows_its_machine() -> bool:
    """Whether the user, or a launcher that Lightning knows, says which machine this is."""
    others = (LSFEnvironment, MPIEnvironment)
    has_rank = "NODE_RANK" in os.environ or "GROUP_RANK" in os.environ
    return ("MASTER_ADDR" in os.environ and has_rank) or any(kind.detect() for kind in others)
