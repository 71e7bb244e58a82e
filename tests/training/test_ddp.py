"""Whole training jobs of two processes, started the way `train.py` starts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nvae.checkpoint import load_checkpoint
from tests import PATIENCE
from tests.training.runs import assert_identical

ROOT = Path(__file__).parents[2]


def _job(folder: Path, mode: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/training/ddp_job.py"), str(folder), mode],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks have ended, beside a run of that name, with resume=never."""
    folder = tmp_path_factory.mktemp("spoilt")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").touch()
    job = _job(folder, "spoil")
    assert job.returncode == 0, job.stderr[-3000:]
    return folder


def _results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_work_in_one_folder(spoilt: Path) -> None:
    """The second starts when the first has made its own, and must not go on to the next."""
    assert [result["folder"] for result in _results(spoilt)] == ["run-2", "run-2"]


def test_the_best_holds_the_average_with_several_ranks(spoilt: Path) -> None:
    folder = spoilt / "run-2" / "checkpoints"
    best = load_checkpoint(folder / "best.ckpt")
    same = load_checkpoint(folder / f"step_{best['global_step']:08d}.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert_identical(best[key], same[key])


def test_ranks_stay_equal_and_share_bad_steps(spoilt: Path) -> None:
    """One rank's NaN: no hang, both leave the step out, parameters stay bit-equal."""
    a, b = _results(spoilt)
    assert a["initial"] == b["initial"] != a["final"]
    assert a["final"] == b["final"]
    assert a["finite"]
    assert a["steps"] == b["steps"] == 16
    assert a["noise"] != b["noise"]
    lines = (spoilt / "run-2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines if "skipped" in x][-1]["train/skipped_steps"] == 2


@pytest.mark.slow
def test_ranks_that_share_no_statistics_stay_equal(tmp_path: Path, spoilt: Path) -> None:
    """The average of weights and running statistics at the end; not that of shared ones."""
    job = _job(tmp_path, "apart")
    assert job.returncode == 0, job.stderr[-3000:]
    a, b = _results(tmp_path)
    shared, _ = _results(spoilt)
    assert a["final"] == b["final"] != shared["final"]
    assert a["finite"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_dead_rank_ends_the_job(tmp_path: Path, rank: int) -> None:
    """Before the collective's time-out of 600 seconds, with a code that is not 0, nobody left."""
    job = _job(tmp_path, f"die{rank}")
    assert job.returncode != 0
    assert (tmp_path / "run" / "metrics.jsonl").exists()  # it had begun
    while _left_behind(tmp_path):
        time.sleep(0.1)


def _left_behind(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if str(folder) in command and "ddp_job" in command:
            found.append(command)
    return found
