"""Errors of settings, Ctrl-C and what is printed, as the commands tell them."""

import subprocess
import sys
from pathlib import Path

import pytest

from nvae.cli import evaluate, sample
from nvae.command_line import interruptible
from nvae.export import __main__ as export

from .commands import Commands


@pytest.mark.parametrize(
    ("command", "argument", "line"),
    [
        (evaluate, "importance_samples=[1.5]", "importance_samples[0]: 1.5 is not an integer"),
        (evaluate, "importance_samples=5",
         "importance_samples=5 is not a list; write importance_samples=[5]"),
        (evaluate, "metrics=fid", "metrics=fid is not a list; write metrics=[fid]"),
        (sample, "keep=[1,a]", "keep[1]: a is not an integer"),
        (sample, "keep=[null]", "keep[0]: null is not an integer"),
        (sample, "keep=2", "keep=2 is not a list; write keep=[2]"),
        (sample, "group_temperatures=[x]", "group_temperatures[0]: x is not a number"),
        (sample, "group_temperatures=x",
         "group_temperatures=x is not a list; write group_temperatures=[x]"),
        (sample, "steps=many", "steps=many is not an integer"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(command, argument, line, monkeypatch, capsys, tmp_path):
    run = Commands(command.main, monkeypatch, capsys, tmp_path)
    assert run.fails("checkpoint=model.ckpt", argument) == f"error: {line}\n"


@pytest.mark.parametrize(
    ("module", "work", "arguments"),
    [
        (sample, "open_checkpoint", ["checkpoint=model.ckpt"]),
        (evaluate, "open_checkpoint", ["checkpoint=model.ckpt"]),
        (export, "export", ["model.ckpt", "--to", "folder"]),
    ],
)
def test_ctrl_c_is_one_line(module, work, arguments, monkeypatch, capsys, tmp_path):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, work, interrupted)
    with pytest.raises(SystemExit, match="130"):
        Commands(module.main, monkeypatch, capsys, tmp_path)(*arguments)
    assert capsys.readouterr().err == "interrupted; run the same command again\n"


def test_only_ctrl_c_is_caught():
    with pytest.raises(RuntimeError), interruptible():
        raise RuntimeError


SAMPLE = [sys.executable, str(Path(__file__).parents[2] / "sample.py"), "--help"]


def test_help_is_of_the_program():
    """Groups that only train.py has are not offered."""
    said = subprocess.run(SAMPLE, capture_output=True, text=True, check=True).stdout
    assert said.startswith("python sample.py SETTING=VALUE ...")
    assert "scale_temperatures: null" in said
    assert "experiment" not in said


def test_a_reader_that_has_had_enough():
    """As `| head`: nothing is said, and 141 is what other programs end with."""
    with subprocess.Popen(SAMPLE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
