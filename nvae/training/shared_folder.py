"""One folder for all processes of a run: the first chooses and locks it, the others are told.

Were each to look for itself, those that come late would find the first one's folder taken.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from nvae.training.run_lock import RunLock, lock_unused

_HANDED_DOWN = "NVAE_RUN_FOLDER"


class Claim:
    """A run's folder. The first process of the run has it locked until the block ends.

    All processes of a run have to make one, and get the same folder or the same error.

    Args:
        path: that the run's name gives.
        beside: take an unused folder, ``path`` or one beside it, instead of ``path`` as it is.
        processes: of the run.

    Raises:
        ValueError: the folder is in use.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path, *, beside: bool = False, processes: int = 1) -> None:
        self._asked, self._beside = path, beside
        self._lock: RunLock | None = None
        self.path = self._take() if processes == 1 else shared_path(self._take)

    def _take(self) -> Path:
        try:
            self._lock = lock_unused(self._asked) if self._beside else RunLock(self._asked)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"{self._asked} cannot be the run's folder: {reason}; check runs_dir and name"
            ) from None
        return self._lock.folder

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()


def _launcher() -> type[ClusterEnvironment] | None:
    kinds = (TorchElasticEnvironment, SLURMEnvironment)  # in Lightning's order
    return next((kind for kind in kinds if kind.detect()), None)


def is_started_by_launcher() -> bool:
    """Whether torchrun or SLURM starts all processes of the run."""
    return _launcher() is not None


def shared_path(choose: Callable[[], Path]) -> Path:
    """What ``choose`` gives in the first process, on every one; all of them have to call this.

    Three ways, by how the processes came to be: a process group that is there already (a sweep's
    second run), the address where torchrun's or SLURM's processes are about to meet, and the
    environment of those that Lightning starts from the first, later on.

    Raises:
        ValueError: the first process's, on all of them.
    """
    if dist.is_available() and dist.is_initialized():
        return _told_in_group(choose)
    launcher = _launcher()
    if launcher is not None:
        return _told_through_store(launcher(), choose)
    if os.environ.get("LOCAL_RANK", "0") != "0" and _HANDED_DOWN in os.environ:
        return Path(os.environ[_HANDED_DOWN])
    here = choose()
    os.environ[_HANDED_DOWN] = str(here)
    return here


def _answer(choose: Callable[[], Path]) -> str:
    """The path, or the error, as one text for all."""
    try:
        return f"+{choose()}"
    except ValueError as error:
        return f"-{error}"


def _understood(answer: str) -> Path:
    if answer.startswith("-"):
        raise ValueError(answer[1:])
    return Path(answer[1:])


def _told_in_group(choose: Callable[[], Path]) -> Path:
    answer = [_answer(choose) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(answer)
    return _understood(answer[0])


def _told_through_store(environment: ClusterEnvironment, choose: Callable[[], Path]) -> Path:
    rank, world = environment.global_rank(), environment.world_size()
    if world == 1:
        return choose()
    # no process group: its keys would stay in torchrun's store and mislead the one to come
    url = f"tcp://{environment.main_address}:{environment.main_port}"
    server, *_ = next(dist.rendezvous(url, rank, world))
    store = dist.PrefixStore("nvae_run_folder", server)
    if rank:
        answer = store.get("path").decode()
        store.set(f"read_{rank}", "")
        return _understood(answer)
    answer = _answer(choose)
    store.set("path", answer)
    # on SLURM the store is this process's own, and ends with this function
    store.wait([f"read_{other}" for other in range(1, world)])
    return _understood(answer)
