import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from nvae.host_memory import keep_freed_memory
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
