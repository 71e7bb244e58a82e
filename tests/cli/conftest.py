"""What the tests of `sample.py` and `evaluate.py` share."""

import pytest

from nvae.cli.evaluate import main as evaluate_main

from .checkpoints import write_checkpoint
from .commands import Commands


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model.ckpt")


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    return Commands(evaluate_main, monkeypatch, capsys, tmp_path)
