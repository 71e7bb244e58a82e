"""Where results come from, devices and progress, as the commands share them."""

import hashlib
import subprocess
import sys

import pytest
import torch

from nvae.cli import common
from nvae.cli.common import file_sha256, open_device, progress_bar, short_hash, versions


def test_hashes_are_of_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert short_hash({"a": 1, "b": 2}) == short_hash({"b": 2, "a": 1})
    assert short_hash({"a": 1}) != short_hash({"a": 2})


def test_versions_name_the_software_and_the_device():
    found = versions(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert "CPU" in found["device"]


def test_devices():
    assert open_device("cpu", tf32=False) == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError, match="allowed: auto"):
        open_device("quantum", tf32=False)
    with pytest.raises(ValueError, match="CUDA device"):
        open_device("cuda:4000", tf32=False)


def test_without_a_terminal_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(common.time, "monotonic", lambda: float(next(clock)))
    with progress_bar("work", 8) as advance:
        for _ in range(4):
            advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["work  4/8  0:30 left", "work  8/8  0:00 left"]
    with progress_bar("work", 8, shown=False) as advance:
        advance(8)
    assert capsys.readouterr().err == ""


PROGRAM = """
import resource, torch
from nvae.cli.common import keep_freed_memory
if {keep} and not keep_freed_memory():
    raise SystemExit(3)
def work():
    for _ in range(20):
        [torch.ones(10_000_000) for _ in range(2)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True
    )
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_blocks_are_not_faulted_in_again() -> None:
    """Counted by the kernel: large blocks freed and allocated again cost no page faults."""
    assert page_faults(keep=True) < page_faults(keep=False) / 10
