"""The examples run as they stand; those that only define a class are in `test_extending.py`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "EPOCHS": "1",
}


def _run(script: Path, folder: Path) -> str:
    job = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stderr
    return job.stdout


SCRIPTS = [path for path in sorted(EXAMPLES.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_runs(tmp_path: Path, script: Path) -> None:
    assert _run(script, tmp_path)


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path) -> None:
    """Its code cells in order, for one epoch, in a process of their own: that needs no kernel."""
    notebook = json.loads((EXAMPLES / "train_in_a_notebook.ipynb").read_text())
    code = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join("".join(lines) for lines in code))
    _run(tmp_path / "cells.py", tmp_path)


JOB = EXAMPLES / "slurm" / "train.sbatch"


def test_slurm_job_names_what_train_takes() -> None:
    """Its command line composes, and the job goes back to the queue."""
    from hydra import compose, initialize_config_dir

    from nvae.cli.config import register

    register()
    settings = JOB.read_text().split("train.py experiment")[1].removesuffix('"$@"\n').split()
    overrides = [f"experiment{settings[0]}", *settings[1:]]
    with initialize_config_dir(str(EXAMPLES.parent / "configs"), version_base="1.3"):
        config = compose("train", overrides=overrides)
    assert config.trainer.plugins[0]._target_.endswith("SLURMEnvironment")
    assert config.callbacks.signals.requeue
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", JOB.read_text(), re.MULTILINE))
    assert int(asked["nodes"]) == config.trainer.num_nodes
    assert int(asked["ntasks-per-node"]) == config.trainer.devices


def test_slurm_job_is_a_sound_script(tmp_path: Path) -> None:
    """It gives every setting on to `train.py`, and its code is that of srun."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 7\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.run(
        ["bash", JOB, "name=a b", "seed=2"], env=environment, capture_output=True, text=True
    )
    assert (job.returncode, job.stderr) == (7, "")
    assert job.stdout.splitlines()[0] == "--kill-on-bad-exit=1"
    assert job.stdout.splitlines()[-2:] == ["name=a b", "seed=2"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    job = subprocess.run(["shellcheck", JOB], capture_output=True, text=True)
    assert (job.returncode, job.stdout) == (0, "")
