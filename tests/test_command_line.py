"""Errors of one line, and Ctrl-C."""

import subprocess
import sys

import pytest

from nvae.command_line import LONGEST_MESSAGE, brief, fail, shell


def test_messages_are_short_and_of_one_line():
    assert brief("a\n  b\tc") == "a b c"
    long = brief("start " + "x" * 5_000_000 + " end")
    assert len(long) <= LONGEST_MESSAGE
    assert long.startswith("start x")
    assert long.endswith("x end")


def test_addresses_are_left_out():
    assert brief(f"{object()} and {test_addresses_are_left_out}") == (
        "<object> and <function test_addresses_are_left_out>"
    )


def test_an_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        raise fail("a\nb")
    assert capsys.readouterr().err == "error: a b\n"


def test_printed_commands_can_be_typed():
    assert shell("python", "x.py", "a=[1,2]", "b c") == "python x.py 'a=[1,2]' 'b c'"


@pytest.mark.parametrize(
    "module", ["nvae.report", "nvae.export", "nvae.codec", "nvae.data.prepare"]
)
@pytest.mark.parametrize("arguments", [["--unknown"], []])
def test_wrong_arguments_are_one_line(module, arguments):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_second_ctrl_c_prints_nothing_either():
    script = (
        "import signal\n"
        "from nvae.command_line import interruptible\n"
        "with interruptible():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    finally:\n"
        "        pass\n"
    )
    script_with_second = script.replace("with interruptible():", "import atexit\natexit.register("
        "lambda: signal.raise_signal(signal.SIGINT))\nwith interruptible():")  # fmt: skip
    for code, text in ((130, script), (-2, script_with_second)):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert done.returncode == code
        assert done.stderr == "interrupted; run the same command again\n"


def test_it_imports_nothing_heavy():
    """Ctrl-C must be answered while torch is being imported."""
    script = "import sys, nvae.command_line; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n"
