"""What the first process of a run decides, told to all others.

Were each to look for itself, they could see a shared folder at different moments, or different
devices, and go separate ways. Processes that torchrun or SLURM starts meet first of all, and talk
through their process group; those that Lightning starts from the first, later on, find in their
environment what it has decided before.
"""

import atexit
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from nvae.started import will_start_others
from nvae.training.ranks import on_first_rank
from nvae.training.trainer import TrainerConfig

_HANDED_DOWN = "NVAE_DECISIONS"
"""Environment variable with the decisions so far, for the processes that Lightning starts."""


def _launcher() -> type[ClusterEnvironment] | None:
    kinds = (TorchElasticEnvironment, SLURMEnvironment)  # in Lightning's order
    return next((kind for kind in kinds if kind.detect()), None)


def is_started_by_launcher() -> bool:
    """Whether torchrun or SLURM starts all processes of the run."""
    return _launcher() is not None


def meet(config: TrainerConfig) -> None:
    """Make the process group of a run that torchrun or SLURM has started, before anything else.

    It is the one that Lightning would make later, and finds. One process needs no group, and
    where Lightning starts the others it makes the group. It ends with the process.

    Raises:
        ValueError: the launcher has started another number of processes than the settings say.
    """
    if config.world_size == 1:
        return
    atexit.register(_part)
    launcher = _launcher()
    if launcher is None or dist.is_initialized():
        return
    environment = launcher()
    environment.validate_settings(config.devices, config.num_nodes)
    device = None
    if config.resolved_accelerator() == "gpu":
        device = torch.device("cuda", environment.local_rank())
        torch.cuda.set_device(device)
    os.environ["MASTER_ADDR"] = environment.main_address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    dist.init_process_group(
        config.process_group_backend(), rank=environment.global_rank(),
        world_size=environment.world_size(), timeout=timedelta(seconds=config.timeout),
        device_id=device,
    )  # fmt: skip


def _part() -> None:
    # left to the interpreter's end, gloo's threads may want Python when it is gone: an abort
    if dist.is_initialized():
        dist.destroy_process_group()


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
