"""One unused folder for all processes of a run: the first looks, the others are told.

Were each to look for itself, those that come late would find the first one's folder taken.
"""

import os
from pathlib import Path

import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

_HANDED_DOWN = "NVAE_RUN_FOLDER"


def shared_unused_path(path: Path) -> Path:
    """:func:`unused_path` of the first process, on every one; all of them have to call this.

    Three ways, by how the processes came to be: a process group that is there already (a sweep's
    second run), the address where torchrun's or SLURM's processes are about to meet, and the
    environment of those that Lightning starts from the first, later on.
    """
    if dist.is_available() and dist.is_initialized():
        found = [str(unused_path(path)) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found)
        return Path(str(found[0]))
    for kind in (TorchElasticEnvironment, SLURMEnvironment):  # in Lightning's order
        if kind.detect():
            return _told_through_store(kind(), path)
    if os.environ.get("LOCAL_RANK", "0") != "0" and _HANDED_DOWN in os.environ:
        return Path(os.environ[_HANDED_DOWN])
    here = unused_path(path)
    os.environ[_HANDED_DOWN] = str(here)
    return here


def _told_through_store(environment: ClusterEnvironment, path: Path) -> Path:
    rank, world = environment.global_rank(), environment.world_size()
    if world == 1:
        return unused_path(path)
    # no process group: its keys would stay in torchrun's store and mislead the one to come
    url = f"tcp://{environment.main_address}:{environment.main_port}"
    server, *_ = next(dist.rendezvous(url, rank, world))
    store = dist.PrefixStore("nvae_run_folder", server)
    if rank:
        told = Path(store.get("path").decode())
        store.set(f"read_{rank}", "")
        return told
    here = unused_path(path)
    store.set("path", str(here))
    # on SLURM the store is this process's own, and ends with this function
    store.wait([f"read_{other}" for other in range(1, world)])
    return here


def unused_path(path: Path) -> Path:
    """``path`` itself if nothing is there, else the first free of ``path-2``, ``path-3``, ..."""
    candidate, number = path, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
