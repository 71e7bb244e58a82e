"""A process that the first one started does not outlive it."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvae.started import FIRST_PROCESS
from tests import PATIENCE

ROOT = Path(__file__).parents[1]

RANK = """
import time
from nvae.started import end_with_first_process

end_with_first_process()
print("begun", flush=True)
time.sleep({seconds})
print("done", flush=True)
"""

FIRST = """
import os, subprocess, sys, time
from nvae.started import will_start_others

will_start_others()
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | {"LOCAL_RANK": "1"})
time.sleep(600)
"""


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


@pytest.fixture
def ended() -> str:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return str(process.pid)


def test_a_rank_whose_first_process_is_gone_does_not_begin(ended: str) -> None:
    """Interrupted between the two, the first has left one behind that it does not know."""
    job = subprocess.run(
        [sys.executable, ROOT / "train.py", "data=random"], capture_output=True, text=True,
        env=_environment(LOCAL_RANK="1", **{FIRST_PROCESS: ended}), timeout=PATIENCE,
    )  # fmt: skip
    assert (job.returncode, job.stdout, job.stderr) == (1, "", "")


def test_a_rank_ends_when_the_first_process_is_killed() -> None:
    """It holds the pipe, which is at its end only when both are gone."""
    with subprocess.Popen(
        [sys.executable, "-c", FIRST, RANK.format(seconds=600)], env=_environment(),
        stdout=subprocess.PIPE,
    ) as first:  # fmt: skip
        assert first.stdout is not None
        assert first.stdout.readline() == b"begun\n"
        first.send_signal(signal.SIGKILL)
        readable, _, _ = select.select([first.stdout], [], [], PATIENCE)
        assert readable
        assert first.stdout.read() == b""


@pytest.mark.parametrize(
    "others",
    [{"LOCAL_RANK": "0"}, {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, {"RANK": "1"}],
    ids=["a first process of its own", "of torchrun", "of SLURM"],
)
def test_others_than_those_that_lightning_starts_go_on(ended: str, others: dict[str, str]) -> None:
    """In an environment that a process which has trained before left to them."""
    environment = {k: v for k, v in _environment().items() if k != "LOCAL_RANK"}
    job = subprocess.run(
        [sys.executable, "-c", RANK.format(seconds=0.5)], capture_output=True, text=True,
        env=environment | {FIRST_PROCESS: ended} | others, timeout=PATIENCE,
    )  # fmt: skip
    assert (job.returncode, job.stdout) == (0, "begun\ndone\n")
