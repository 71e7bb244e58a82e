"""Processes that a launcher starts meet first of all, and part before Python ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvae.training.processes import decided
from nvae.training.trainer import TrainerConfig, meet
from tests import PATIENCE
from tests.training.ranks import free_port

ROOT = Path(__file__).parents[2]

PENDING = """
import os, sys, time
import torch
import torch.distributed as dist
from nvae.training.trainer import meet
from nvae.training.trainer import TrainerConfig

meet(TrainerConfig(accelerator="cpu", devices=2))
if dist.get_rank():
    time.sleep(1)
work = dist.all_reduce(torch.ones(1), async_op=True)
work.get_future().then(lambda done: done.value())  # in a thread, which needs Python
if dist.get_rank():
    work.wait()
"""


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "NVAE"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.mark.slow
def test_a_group_parts_before_python_ends(tmp_path: Path) -> None:
    """Else gloo's thread aborts the process: it waits for Python when that is gone."""
    (tmp_path / "job.py").write_text(PENDING)
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), "job.py"],
        cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]


def test_a_launcher_that_started_another_number_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", "3"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="does not match the world size"):
        meet(TrainerConfig(accelerator="cpu", devices=2))


def test_the_first_process_decides_and_hands_down(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NVAE_DECISIONS", "NVAE_FIRST_PROCESS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    assert decided("one", lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert decided("two", lambda: True) is True
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert decided("one", lambda: 1 / 0) == {"a": [1, None]}
    assert decided("two", lambda: 1 / 0) is True


def test_the_backend_is_the_users_where_given() -> None:
    config = TrainerConfig(accelerator="cpu", devices=2)
    assert config.process_group_backend() == "gloo"
    config.strategy = {"_target_": "x", "process_group_backend": "mpi"}  # type: ignore[attr-defined]
    assert config.process_group_backend() == "mpi"
