"""Processes that did not start one another find the same unused folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nvae.training import run_folder
from nvae.training.checkpointing import FoundCheckpoint, newest_checkpoint
from nvae.training.ranks import OtherRankError
from nvae.training.run_folder import Claim, RunLock, open_run, open_run_once
from tests import PATIENCE
from tests.training.ranks import free_port, run_ranks
from tests.training.runs import StopAt, run, small_config

ROOT = Path(__file__).parents[2]

JOB = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from nvae.training.trainer import meet
from nvae.training.run_folder import Claim
from nvae.training.trainer import TrainerConfig

rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID")))
meet(TrainerConfig(accelerator="cpu", devices=2))
time.sleep(rank)  # the first has made its folder by then, if it did not wait
claim = Claim(Path("run"), beside=True, processes=2)
found = claim.path
if rank == 0:
    (found / "checkpoints").mkdir(parents=True)
# a file each: two processes that print to one pipe may write into one another's lines
Path(f"found{rank}").write_text(found.name)
dist.barrier()
"""


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A folder where `run` is not free."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return tmp_path


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def _found(folder: Path) -> list[str]:
    return [(folder / f"found{rank}").read_text() for rank in (0, 1)]


@pytest.mark.slow
def test_under_torchrun(taken: Path) -> None:
    (taken / "job.py").write_text(JOB)
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), "job.py"],
        cwd=taken, env=_environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]
    assert _found(taken) == ["run-2", "run-2"]


@pytest.mark.slow
def test_under_slurm(taken: Path) -> None:
    (taken / "job.py").write_text(JOB)
    common = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    jobs = [
        subprocess.Popen(
            [sys.executable, "job.py"], cwd=taken,
            env=_environment(**common, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert [job.wait(timeout=PATIENCE) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    assert _found(taken) == ["run-2", "run-2"]


def _second_run(rank: int, world: int, folder: str) -> str:
    with Claim(Path(folder) / "run", beside=True, processes=world) as claim:
        (claim.path / f"rank{rank}").touch()
        dist.barrier()
        return claim.path.name


def test_in_a_process_group(taken: Path) -> None:
    """A sweep's second run: the processes of the first go on."""
    assert run_ranks(_second_run, 2, str(taken)) == ["run-2", "run-2"]


def _in_use(rank: int, world: int, folder: str) -> str:
    try:
        Claim(Path(folder) / "run", processes=world)
    except (ValueError, OtherRankError) as error:
        return str(error)
    return "not refused"


def test_all_processes_are_told_that_it_is_in_use(taken: Path) -> None:
    """The first alone looks; none of the others is left waiting for it."""
    with RunLock(taken / "run"):
        told = run_ranks(_in_use, 2, str(taken))
    assert told[0] == told[1]
    assert f"in use by process {os.getpid()} on host" in told[0]


def _start(rank: int, world: int, folder: str, resume: str) -> tuple[Any, int]:
    """Where the run starts, and how often this rank has looked into the folder."""
    looks = []

    def looked(path: Path) -> FoundCheckpoint | None:
        looks.append(path)
        return newest_checkpoint(path)

    run_folder.newest_checkpoint = looked  # type: ignore[assignment]
    config = small_config(Path(folder)).to_dict()
    try:
        start: Any = open_run_once(Path(folder) / "run", resume, config, processes=world)
    except (ValueError, OtherRankError) as error:
        start = str(error)
    return start, len(looks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose newest checkpoint is damaged."""
    folder = tmp_path_factory.mktemp("trained")
    run(small_config(folder), StopAt(2))
    (folder / "run" / "checkpoints" / "step_00000003.ckpt").write_bytes(b"damaged")
    return folder


def test_the_first_process_alone_looks_for_a_checkpoint(trained: Path) -> None:
    (first, looks), (other, none) = run_ranks(_start, 2, str(trained), "auto")
    assert (looks, none) == (1, 0)
    assert first == other == open_run(trained / "run", "auto", small_config(trained).to_dict())
    assert first[0].step == 2
    assert len(first[0].passed_over) == 1


def test_all_are_told_that_a_run_cannot_go_on(tmp_path: Path) -> None:
    (first, looks), (other, none) = run_ranks(_start, 2, str(tmp_path), "must")
    assert (looks, none) == (1, 0)
    assert first == other
    assert "has no checkpoint" in first


def test_a_process_that_lightning_starts_does_not_look(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(trained).to_dict()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("NVAE_DECISIONS", raising=False)
    monkeypatch.delenv("NVAE_FIRST_PROCESS", raising=False)
    first = open_run_once(trained / "run", "auto", config, processes=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(run_folder, "newest_checkpoint", None)
    assert open_run_once(trained / "run", "auto", config, processes=2) == first


def test_processes_started_later_are_told(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first never listens to itself: its next run has a folder of its own."""

    def claim() -> Claim:
        return Claim(taken / "run", beside=True, processes=2)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("NVAE_FIRST_PROCESS", raising=False)
    monkeypatch.setenv("NVAE_DECISIONS", '{"folder": "elsewhere"}')
    first = claim()
    assert first.path == taken / "run-2"
    (taken / "run-2" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert claim().path == taken / "run-2"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert claim().path == taken / "run-3"
