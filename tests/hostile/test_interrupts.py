"""Ctrl-C while a command is still importing: one line, exit code 130, no traceback.

A module that stands in for the first heavy one sends the signal while it is imported.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = "interrupted; run the same command again\n"
ONCE = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**9): pass\n"
TWICE = (
    "import atexit, os, signal\n"
    "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n" + ONCE
)
HANDLING = "import os, signal\ntry:\n    raise ImportError\nexcept ImportError:\n" + (
    "    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(10**9): pass\n"
)
COMMANDS = {
    "train": ["train.py"],
    "sample": ["sample.py"],
    "evaluate": ["evaluate.py"],
    "compress": ["compress.py"],
    "decompress": ["decompress.py"],
    "codec": ["-m", "nvae.codec", "info", "x"],
    "report": ["-m", "nvae.report", "x"],
    "export": ["-m", "nvae.export", "x", "--to", "y"],
}


CASES = [(command, ONCE, 130) for command in COMMANDS] + [
    ("evaluate", HANDLING, 130),
    ("train", TWICE, -signal.SIGINT),
    ("report", TWICE, -signal.SIGINT),
]


@pytest.mark.parametrize(("command", "code", "exit_code"), CASES)
def test_while_importing(tmp_path, command, code, exit_code):
    for name in ("yaml", "torch", "hydra"):
        (tmp_path / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]], cwd=ROOT, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert (done.stderr, done.returncode) == (LINE, exit_code)
