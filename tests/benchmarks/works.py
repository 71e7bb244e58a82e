"""What cases of the tests do in their processes, and a command made of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.running import Bar, Case, Cases, Emit, Part, Setting


def measure(emit: Emit, value: float) -> None:
    print("said by a case")
    emit(f"value {value}", value=value)


def fail(emit: Emit) -> None:
    emit("half of it", half=1)
    raise ValueError("there is\nno kernel")


def crash(emit: Emit) -> None:
    emit("half of it", half=1)
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(emit: Emit) -> None:
    """With a process of its own, as compilers have."""
    with subprocess.Popen(["sleep", "600"]) as process:
        emit("it hangs", sleeper=process.pid, worker=os.getpid())
        time.sleep(600)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cases(_: Setting) -> list[Case]:
    return [
        Case("one", measure, {"value": 3.0}),
        Case("broken", fail),
        Case("two", measure, {"value": 5.0}),
    ]


def figures(found: Cases) -> Iterator[tuple[str, str, str]]:
    for name, values in found.items():
        if "value" in values:
            yield name, f"{values['value']:g}", ""


def largest(found: Cases) -> float | None:
    return max((values["value"] for values in found.values() if "value" in values), default=None)


PARTS = (
    Part("small", cases, figures, (Bar("largest", 4, " m", largest),)),
    Part("slow", lambda _: [Case("short", measure, {"value": 1.0}), Case("hangs", hang)], figures),
    Part("last", lambda _: [Case("short", measure, {"value": 2.0})], figures),
)

if __name__ == "__main__":
    from tests.benchmarks import works  # the processes know the functions by this name

    sys.exit(main(sys.argv[1:], works.PARTS))
