"""What the acceptance leaves: a JSON file for each part, the bars, and a table in Markdown."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.running import DRY, Cases, Emit, Part
from nvae.files import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("triton", "cuda-bindings", "pytorch-lightning")


def environment(emit: Emit, dry: bool) -> None:
    """Emit the device and the versions that figures belong to."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if dry:
        emit("dry: tiny shapes on the CPU; no figure means anything", device=DRY, versions=found)
        return
    gpu = torch.cuda.get_device_properties(0)
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    emit(
        f"{gpu.name}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        device=gpu.name,
        capability=f"{gpu.major}.{gpu.minor}",
        multiprocessors=gpu.multi_processor_count,
        memory_gib=round(gpu.total_memory / 2**30, 1),
        versions=found,
    )


def commit() -> str | None:
    """Of the working tree; None where there is no git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


class PartFile:
    """The results of a part on one kind of machine, in a file that is whole at any time.

    Cases that are not measured again stay, where the machine and the versions are the same.

    Args:
        path: of the file.
        place: :func:`environment`.
    """

    def __init__(self, path: Path, place: dict[str, Any]) -> None:
        self.path, self.place = path, place
        self.cases: dict[str, dict[str, Any]] = {}
        if path.exists():
            kept = read_json(path)
            if kept["environment"] == place:
                self.cases = kept["cases"]
        self.commit = commit()

    def begin(self, case: str) -> None:
        """Forget what an earlier run has measured."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.cases[case] = {"date": date, "commit": self.commit, "ended": False}
        self._write()

    def add(self, case: str, **values: Any) -> None:
        """Keep values, and write the file."""
        self.cases[case] |= values
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"environment": self.place, "cases": self.cases})


def read_results(folder: Path, parts: Sequence[Part]) -> tuple[str, dict[str, Cases]]:
    """Device and cases by part, of a folder's files; parts without a file are left out."""
    found: dict[str, Cases] = {}
    device = folder.name
    for part in parts:
        path = folder / f"{part.name}.json"
        if path.exists():
            content = read_json(path)
            found[part.name], device = content["cases"], content["environment"]["device"]
    return device, found


def table(device: str, results: dict[str, Cases], parts: Sequence[Part]) -> str:
    """All bars and figures, in Markdown."""
    lines = [f"| bar, on {device} | wanted | measured | |", "|---|---|---|---|"]
    for part in parts:
        cases = results.get(part.name, {})
        for bar in part.bars:
            value = bar.measured(cases)
            shown = "-" if value is None else f"{value:.3g}{bar.unit}"
            sign = "<=" if bar.at_most else ">="
            wanted = f"{sign} {bar.wanted:g}{bar.unit}"
            lines.append(f"| {bar.what} | {wanted} | {shown} | {bar.verdict(cases, device)} |")
    lines += ["", f"| measured, on {device} | | |", "|---|---|---|"]
    for part in parts:
        cases = results.get(part.name, {})
        lines += [f"| {' | '.join(row)} |" for row in part.figures(cases)]
        lines += [f"| {part.name}: {name} | failed | {why} |" for name, why in failures(cases)]
    return "\n".join(lines) + "\n"


def failures(cases: Cases) -> Iterator[tuple[str, str]]:
    """Cases that did not come to their end, and why."""
    for name, values in cases.items():
        if "error" in values:
            yield name, values["error"].replace("|", "/")
        elif not values.get("ended"):
            yield name, "it was interrupted"


def unmet(device: str, results: dict[str, Cases], parts: Sequence[Part]) -> list[str]:
    """Bars of the parts that were measured and are not met."""
    return [
        bar.what
        for part in parts
        for bar in part.bars
        if bar.verdict(results.get(part.name, {}), device) == "not met"
    ]
