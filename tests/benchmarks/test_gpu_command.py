"""The acceptance's command and its processes, on parts that need no GPU."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import record
from benchmarks.gpu.__main__ import PARTS, main, options_of, print_tables
from benchmarks.gpu.running import Bar, Case, run_case
from tests.benchmarks import works
from tests.test_borders import ROOT


def run(case: Case, tmp_path: Path, seconds: float = 60.0) -> tuple[str | None, dict[str, Any]]:
    values: dict[str, Any] = {}
    reason = run_case(case, seconds, tmp_path / "log", lambda _, found: values.update(found))
    return reason, values


@pytest.mark.slow
def test_a_case_fails_alone(tmp_path: Path) -> None:
    """An error and a crash leave their reason, and what was measured before."""
    assert run(Case("good", works.measure, {"value": 3.0}), tmp_path) == (None, {"value": 3.0})
    assert (tmp_path / "log").read_text() == "said by a case\n"
    reason, values = run(Case("bad", works.fail), tmp_path)
    assert reason == "ValueError: there is no kernel"
    assert values["half"] == 1
    assert "works.py" in values["traceback"]
    reason, values = run(Case("worse", works.crash), tmp_path)
    assert (reason, values) == ("its process ended with SIGSEGV", {"half": 1})


@pytest.mark.slow
def test_a_hanging_case_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    reason, values = run(Case("hangs", works.hang), tmp_path, seconds=8.0)
    assert reason == "stopped after 8 s"
    wait_until(lambda: not works.is_running(values["sleeper"]))
    assert not works.is_running(values["worker"])


def wait_until(true: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def cases_of(out: Path, part: str) -> dict[str, Any]:
    path = out / "dry" / f"{part}.json"
    found: dict[str, Any] = json.loads(path.read_text())["cases"] if path.exists() else {}
    return found


@pytest.mark.slow
def test_parts_bars_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed case does not keep the others from being measured; the exit code tells."""
    assert main(["dry=true", f"out={tmp_path}", "small", "last"], works.PARTS) == 1
    shown, said = capsys.readouterr()
    found = cases_of(tmp_path, "small")
    assert {name: values.get("value") for name, values in found.items()} == {
        "one": 3.0, "broken": None, "two": 5.0,
    }  # fmt: skip
    assert all(values["ended"] for values in found.values())
    assert found["broken"]["error"] == "ValueError: there is no kernel"
    assert cases_of(tmp_path, "last")["short"]["value"] == 2.0
    assert "small, one: value 3.0\n" in shown
    assert "| largest | >= 4 m | 5 m | not judged |\n" in shown
    assert "| two | 5 |  |\n" in shown
    assert "| small: broken | failed | ValueError: there is no kernel |\n" in shown
    assert said == "small, broken: ValueError: there is no kernel\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_survives_a_signal(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C and a job's time limit: no process stays, and the table comes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sender = threading.Thread(target=_send, args=(tmp_path, number))
    sender.start()
    try:
        assert main(["dry=true", f"out={tmp_path}"], works.PARTS) == 128 + number
    finally:
        sender.join()
        signal.signal(signal.SIGINT, before)
    shown, said = capsys.readouterr()
    assert "what was measured is kept" in said
    assert "| slow: hangs | failed | it was interrupted |" in shown
    check_what_is_left(tmp_path)
    assert cases_of(tmp_path, "last") == {}


def _send(out: Path, number: signal.Signals) -> None:
    wait_until(lambda: "sleeper" in cases_of(out, "slow").get("hangs", {}), 300)
    os.kill(os.getpid(), number)


def check_what_is_left(out: Path) -> None:
    """Files are whole, and nothing runs any more."""
    found = cases_of(out, "slow")
    assert found["short"]["value"] == 1.0
    assert not found["hangs"]["ended"]
    for process in ("sleeper", "worker"):
        pid = found["hangs"][process]
        wait_until(lambda pid=pid: not works.is_running(pid))


@pytest.mark.slow
def test_what_was_measured_survives_a_kill(tmp_path: Path) -> None:
    """The processes of the cases end with the command."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.works",
        "dry=true",
        f"out={tmp_path}",
        "slow",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: "sleeper" in cases_of(tmp_path, "slow").get("hangs", {}), 300)
        process.kill()
    check_what_is_left(tmp_path)


@pytest.mark.slow
def test_a_parts_limit_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a part does not reach is said; the next run takes it up, and nothing else."""
    words = ["dry=true", f"out={tmp_path}", "small", "slow"]
    assert main([*words, "limit=8", "only=h"], works.PARTS) == 1
    assert "slow, hangs: stopped after" in capsys.readouterr().err
    assert list(cases_of(tmp_path, "slow")) == ["short", "hangs"]
    assert main([*words, "limit=1", "missing=true"], works.PARTS) == 1
    assert "small, one: not reached in 1 s" in capsys.readouterr().err
    assert main([*words, "only=nothing"], works.PARTS) == 1
    assert "only=nothing is in the name of no case" in capsys.readouterr().err
    first = cases_of(tmp_path, "slow")["short"]
    assert main(["dry=true", f"out={tmp_path}", "last", "missing=true"], works.PARTS) == 0
    assert cases_of(tmp_path, "slow")["short"] == first


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert capsys.readouterr().err == (
        "error: torch sees no CUDA device; dry=true tries the command on the CPU\n"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["opps"], "'opps' is unknown; parts: tests, ops, steps-cifar10, "),
        (["size=3"], "'size=3' is unknown; parts: "),
        (["limit=soon"], "limit='soon' is no value of limit"),
        (["limit=-1"], "limit='-1' is no value of limit"),
        (["dry=yes"], "dry='yes' is no value of dry"),
        (["training"], "training needs data_root=FOLDER"),
        (["data_root=/nowhere"], "data_root=/nowhere holds no train-images-idx3-ubyte"),
    ],
)
def test_a_bad_word_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        options_of(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_options(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    found = options_of(["ops", "training", f"data_root={tmp_path}", "only=bf16", "limit=60"])
    assert found.parts == ("ops", "training")
    assert (found.data_root, found.only, found.limit) == (str(tmp_path), "bf16", 60.0)
    assert not found.dry


def test_parts_have_names_of_their_own_and_fit_nine_minutes() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.seconds < 9 * 60 for part in PARTS)


def test_a_bar_is_judged_where_it_is_for() -> None:
    """Ratios count on every GPU, a time on the one that it is for."""
    cases = {"step": {"ms": 60.0}}

    def ms(found: Any) -> float | None:
        value: float | None = found.get("step", {}).get("ms")
        return value

    time_bar = Bar("step", 70, " ms", ms, at_most=True, device="H200")
    assert time_bar.verdict(cases, "NVIDIA H200") == "met"
    assert time_bar.verdict({"step": {"ms": 71.0}}, "NVIDIA H200") == "not met"
    assert time_bar.verdict(cases, "NVIDIA A100") == "not judged"
    assert time_bar.verdict({}, "NVIDIA H200") == "not measured"
    assert time_bar.verdict({"step": {"ms": 71.0}}, "dry") == "not judged"
    assert Bar("ratio", 61, "x", ms).verdict(cases, "NVIDIA A100") == "not met"
    assert Bar("ratio", 60, "x", ms).verdict(cases, "NVIDIA A100") == "met"


def test_a_bar_that_is_not_met_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables are of all machines whose results are there, and say what was reached."""
    for device, value in (("NVIDIA A", 3.0), ("NVIDIA B", 5.0)):
        file = record.PartFile(tmp_path / device / "small.json", {"device": device})
        file.begin("one")
        file.add("one", value=value, ended=True)
    assert print_tables(tmp_path, works.PARTS) == ["NVIDIA A: largest: not met"]
    assert main(["table", f"out={tmp_path}"], works.PARTS) == 0
    shown = capsys.readouterr().out
    assert "| bar, on NVIDIA A | wanted | measured | |\n|---|---|---|---|\n" in shown
    assert "| largest | >= 4 m | 3 m | not met |\n" in shown
    assert "| largest | >= 4 m | 5 m | met |\n" in shown


def test_help_is_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(part.name in shown for part in PARTS)


def test_results_stay_on_the_same_machine_alone(tmp_path: Path) -> None:
    """A part that is run again in pieces is one table; other versions begin a new one."""
    place = {"device": "A", "versions": {"torch": "2.11"}}
    path = tmp_path / "part.json"
    first = record.PartFile(path, place)
    for name in ("one", "two"):
        first.begin(name)
        first.add(name, value=1, ended=True)
    again = record.PartFile(path, place)
    again.begin("two")
    assert {n: v.get("value") for n, v in again.cases.items()} == {"one": 1, "two": None}
    assert list(record.failures(again.cases)) == [("two", "it was interrupted")]
    assert record.PartFile(path, place | {"versions": {"torch": "2.12"}}).cases == {}
