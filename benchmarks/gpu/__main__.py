"""Acceptance on a GPU: `python -m benchmarks.gpu [PART ...] [key=value ...]`.

    python -m benchmarks.gpu tests ops
    python -m benchmarks.gpu steps-cifar10 only=bf16
    python -m benchmarks.gpu training data_root=data/fashion_mnist/source
    python -m benchmarks.gpu table

Without names all parts are run: tests, ops, steps-cifar10, steps-celeba64, memory, sampling,
equality, training (the last with `data_root=`, the folder of Fashion-MNIST's IDX files). Each takes
less than nine minutes and keeps what it has measured in `benchmarks/results/DEVICE/PART.json`,
which is whole at any time; what the cases print is in `PART.log`. At the end, and by `table` alone,
bars and figures of all parts are printed in Markdown.

only=TEXT       cases whose names contain it; the others keep their earlier results
missing=true    cases that have no result of this machine and these versions yet
limit=SECONDS   for each part
out=FOLDER      in place of benchmarks/results
dry=true        tiny shapes on the CPU, to try the command; results go to a temporary folder

The exit code is 1 where a case has failed or was not reached, or a bar is not met, and 130 after
Ctrl-C.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ops, record, steps, use
from benchmarks.gpu.running import Case, Part, Setting, run_case
from benchmarks.measure import SWITCH, read_words
from nvae.command_line import fail

PARTS = (
    use.TESTS, ops.PART, *steps.STEPS, steps.MEMORY, use.SAMPLING, steps.EQUALITY, use.TRAINING,
)  # fmt: skip
TABLE = "table"


@dataclass(frozen=True)
class Options:
    """The command line."""

    parts: tuple[str, ...] = ()
    only: str = ""
    missing: bool = False
    limit: float | None = None
    out: Path | None = None
    data_root: str | None = None
    dry: bool = False


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ValueError
    return seconds


KINDS: dict[str, Any] = {
    "only": str, "missing": SWITCH, "limit": _seconds,
    "out": Path, "data_root": str, "dry": SWITCH,
}  # fmt: skip


def options_of(words: Sequence[str], parts: Sequence[Part] = PARTS) -> Options:
    """Read the command line.

    Raises:
        SystemExit: it has a word that means nothing; the line is printed.
    """
    options = read_words(Options(), words, [*(part.name for part in parts), TABLE], KINDS)
    if use.TRAINING.name in options.parts and options.data_root is None:
        raise fail("training needs data_root=FOLDER, the folder of Fashion-MNIST's IDX files")
    if options.data_root is not None:
        root = Path(options.data_root).resolve()
        if not any(root.glob("train-images-idx3-ubyte*")):
            raise fail(f"data_root={root} holds no train-images-idx3-ubyte or .gz of it")
        options = replace(options, data_root=str(root))
    return options


@dataclass
class Acceptance:
    """One run of the command.

    Args:
        options: of the command line.
        out: folder of the results of all devices.
        parts: all there are.
    """

    options: Options
    out: Path
    parts: Sequence[Part] = PARTS
    troubles: list[str] = field(default_factory=list)

    def run(self) -> None:
        """All chosen parts, one after another; what goes wrong is in ``troubles``."""
        self.place = self._environment()
        self.folder = self.out / self.place["device"].replace(" ", "-").replace("/", "-")
        chosen = self.options.parts or tuple(part.name for part in self.parts)
        wanted = 0
        for part in self.parts:
            if part.name not in chosen:
                continue
            if part is use.TRAINING and self.options.data_root is None:
                print("training is left out: it needs data_root=FOLDER", flush=True)
                continue
            wanted += self._run_part(part)
        if not wanted and self.options.only and not self.options.missing:
            self.troubles.append(f"only={self.options.only} is in the name of no case")

    def _environment(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        case = Case("environment", record.environment, {"dry": self.options.dry})
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log:

            def take(line: str, values: dict[str, Any]) -> None:
                found.update(values)
                if line:
                    print(line, flush=True)

            if reason := run_case(case, case.seconds, Path(log.name), take):
                raise fail(f"the GPU cannot be used: {reason}")
        return found

    def _run_part(self, part: Part) -> int:
        seconds = part.seconds if self.options.limit is None else self.options.limit
        file = record.PartFile(self.folder / f"{part.name}.json", self.place)
        until = time.monotonic() + seconds
        setting = Setting(self.options.dry, self.options.data_root, self.folder, seconds)
        cases = [case for case in part.cases(setting) if self._is_wanted(case, file)]
        print(f"{part.name}: {len(cases)} cases, at most {seconds:.0f} s", flush=True)
        for case in cases:
            left = until - time.monotonic()
            if left <= 1:
                print(f"{part.name}, {case.name}: not reached", flush=True)
                self.troubles.append(f"{part.name}, {case.name}: not reached in {seconds:.0f} s")
                continue
            self._run_case(part, case, min(left, case.seconds), file)
        return len(cases)

    def _is_wanted(self, case: Case, file: record.PartFile) -> bool:
        kept = file.cases.get(case.name, {})
        is_there = kept.get("ended", False) and "error" not in kept
        return self.options.only in case.name and not (self.options.missing and is_there)

    def _run_case(self, part: Part, case: Case, seconds: float, file: record.PartFile) -> None:
        file.begin(case.name)
        begin = time.monotonic()

        def take(line: str, values: dict[str, Any]) -> None:
            file.add(case.name, **values)
            if line:
                print(f"{part.name}, {case.name}: {line}", flush=True)

        reason = run_case(case, seconds, self.folder / f"{part.name}.log", take)
        if reason is not None:
            self.troubles.append(f"{part.name}, {case.name}: {reason}")
            take(f"failed: {reason}", {"error": reason})
        file.add(case.name, ended=True, seconds=round(time.monotonic() - begin, 1))


def print_tables(out: Path, parts: Sequence[Part]) -> list[str]:
    """Print the tables of all devices in a folder; bars that are not met."""
    unmet = []
    for folder in sorted(path for path in out.glob("*") if path.is_dir()):
        device, results = record.read_results(folder, parts)
        if results:
            print(f"\n{record.table(device, results, parts)}", flush=True)
            unmet += [f"{device}: {what}: not met" for what in record.unmet(device, results, parts)]
    return unmet


def main(words: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    """The command; its exit code."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    options = options_of(words, parts)
    out = options.out or record.RESULTS
    if options.dry and options.out is None:
        out = Path(tempfile.mkdtemp(prefix="nvae-gpu-dry-"))
    if options.parts == (TABLE,):
        print_tables(out, parts)
        return 0
    if not options.dry and not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device; dry=true tries the command on the CPU",
            file=sys.stderr,
        )
        return 1
    acceptance, code = Acceptance(options, out, parts), 0
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        acceptance.run()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        print("interrupted; what was measured is kept", file=sys.stderr)
    except Terminated:
        code = 128 + signal.SIGTERM
        print("terminated; what was measured is kept", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)
    troubles = acceptance.troubles + print_tables(out, parts)
    for line in troubles:
        print(line, file=sys.stderr)
    print(f"results: {out}", flush=True)
    return code or int(bool(troubles))


class Terminated(BaseException):
    """SIGTERM: from a job's time limit, for one."""


def _stop(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
