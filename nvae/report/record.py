"""What a run's folder says about the run; whatever is not there is left out.

The run may be anybody's. Only regular files that lie in the folder are read, whatever names and
links in it say, and only so much of them; only numbers that a chart can show are numbers.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from nvae.files import open_regular, read_json, read_yaml

Point = tuple[int, float]

_LARGEST_CONFIG, _LARGEST_JSON, _LONGEST_LINE = 1 << 20, 1 << 24, 1 << 20
"""Bytes; ours have some thousands."""

_MOST_LINES = 2_000_000
_MOST_READINGS = 5_000_000
_MOST_METRICS = 2_000
_MOST_STARTS = 1_000
_MOST_EVALUATIONS = 200
_MOST_PICTURES = 100_000
_LARGEST_NUMBER = 1e100
_LATEST = 1e11
"""Seconds since 1970: the year 5138."""

FINALS = {
    "samples.png": "Temperatures, at the end",
    "reconstructions.png": "Test images and reconstructions, at the end",
}
"""Pictures that training writes when it ends, with their titles."""

_ESTIMATES = ("negative_elbo", "reconstruction", "kl", "negative_elbo_bits_per_dim")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the run.

    Attributes:
        source: the file's name.
        split: of the data.
        result: as :meth:`nvae.evaluation.EvaluationResult.to_dict` has it.
        quality: of the samples, by metric; empty where none was measured.
        protocol: what the numbers depend on, as `evaluate.py` wrote it; empty for the evaluation
            at the end of training.
    """

    source: str
    split: str
    result: dict[str, Any]
    quality: dict[str, float]
    protocol: dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it.

    Attributes:
        path: the folder.
        series: every metric's readings, (step, value), steps ascending; finite values only.
        seconds: time spent between readings, pauses of a stopped run left out.
        config: of the last start; empty where there is none.
        starts: what ran, one entry a start.
        evaluations: that of the end of training first, then by name.
        samples: (step, PNG file), steps ascending.
        reconstructions: the same.
        finals: pictures of the end by file name, where they are.
        notes: one line for everything that could not be read.
    """

    path: Path
    series: dict[str, list[Point]]
    seconds: float
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    evaluations: list[Evaluation]
    samples: list[tuple[int, Path]]
    reconstructions: list[tuple[int, Path]]
    finals: dict[str, Path]
    notes: list[str]

    def settings(self, *names: str) -> dict[str, Any]:
        """A group of settings, from the outermost name inwards; empty where there is none."""
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def groups(self, prefix: str) -> list[list[Point]]:
        """Readings of a metric that every latent group has, coarsest first."""
        names = [name for name in self.series if re.fullmatch(rf"{prefix}/[0-9]{{1,4}}", name)]
        return [self.series[name] for name in sorted(names, key=lambda n: int(n.split("/")[1]))]


def read_run(path: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: no folder, or one that no run wrote to.
        OSError: a file cannot be read.
    """
    if not path.is_dir():
        raise ValueError(f"no run at {path}: it takes a run's folder, such as runs/digits")
    if not any((path / name).exists() for name in ("metrics.jsonl", "config.yaml")):
        raise ValueError(f"{path} is no run's folder: it has neither metrics.jsonl nor config.yaml")
    files = _Files(path)
    series, seconds = _metrics(files)
    return RunRecord(
        path=path,
        series=series,
        seconds=seconds,
        config=_config(files),
        starts=list(islice(files.lines("starts.jsonl"), _MOST_STARTS)),
        evaluations=_evaluations(files),
        samples=_pictures(files, "samples"),
        reconstructions=_pictures(files, "reconstructions"),
        finals={file.name: file for name in FINALS for file in files.find(name, 1)},
        notes=files.notes,
    )


class _Files:
    """The files of one folder; ``notes`` has one line for everything that was not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []

    def find(self, pattern: str, most: int) -> list[Path]:
        """The files that match, by name; at most the last ``most`` of them."""
        found = [path for path in sorted(self.folder.glob(pattern)) if self.has(path)]
        if len(found) > most:
            self.notes.append(f"{pattern}: {most} of {len(found)} files are shown")
        return found[-most:]

    def has(self, path: Path) -> bool:
        """Whether there is a regular file that does not lie elsewhere."""
        if not path.is_file():
            return False
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError):  # a link that leads to itself
            inside = False
        if not inside:
            self.notes.append(f"{path.name} is a link that leaves the folder; it is not followed")
        return inside

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a file that has one a line, one at a time; other lines are counted."""
        if not self.has(self.folder / name):
            return
        damaged = 0
        with open_regular(self.folder / name) as file:
            for line in islice(iter(partial(file.readline, _LONGEST_LINE), b""), _MOST_LINES):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):  # a killed process was writing it
                    entry = None
                if isinstance(entry, dict):
                    yield entry
                else:
                    damaged += 1
            if file.read(1):
                self.notes.append(f"{name}: only the first {_MOST_LINES:,} lines were read")
        if damaged:
            self.notes.append(f"{name}: {damaged} line(s) could not be read")


def reading(value: Any) -> float | None:
    """A number that a chart can show; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LARGEST_NUMBER < value < _LARGEST_NUMBER:  # a NaN is not, either
        return None
    return 0.0 if abs(value) < 1 / _LARGEST_NUMBER else float(value)


def whole(value: Any, most: int = 1 << 53) -> int | None:
    """A count, from 0 to ``most``; None for anything else."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
    return value if is_count else None


def _metrics(files: _Files) -> tuple[dict[str, list[Point]], float]:
    """Every metric's readings, and the seconds between them."""
    readings: dict[str, dict[int, float]] = {}
    times: list[float] = []
    count = 0
    for line in files.lines("metrics.jsonl"):
        time, step = reading(line.pop("time", None)), whole(line.pop("step", None))
        if time is not None and abs(time) < _LATEST:
            times.append(time)
        if step is None:
            continue
        for name, value in line.items():
            found = reading(value)
            if found is None or (name not in readings and len(readings) == _MOST_METRICS):
                continue
            readings.setdefault(name, {})[step] = found  # a resumed run's is the later
            count += 1
        if count > _MOST_READINGS:
            files.notes.append(f"metrics.jsonl: only the first {_MOST_READINGS:,} readings count")
            break
    if len(readings) == _MOST_METRICS:
        files.notes.append(f"metrics.jsonl: no more than {_MOST_METRICS:,} metrics are shown")
    return {name: sorted(points.items()) for name, points in readings.items()}, _seconds(times)


def _seconds(times: list[float]) -> float:
    """A gap of more than twenty times the usual one is a pause."""
    gaps = sorted(later - time for time, later in pairwise(sorted(times)))
    usual = max(sum(gaps) / len(gaps), gaps[len(gaps) // 2]) if gaps else 0.0
    return sum(gap for gap in gaps if gap <= 20 * usual)


def _config(files: _Files) -> dict[str, Any]:
    path = files.folder / "config.yaml"
    if not files.has(path):
        return {}
    try:
        config = read_yaml(path, _LARGEST_CONFIG)
    except ValueError:
        config = None
    if isinstance(config, dict):
        return config
    files.notes.append(f"{path.name} could not be read")
    return {}


def _evaluations(files: _Files) -> list[Evaluation]:
    paths = files.find("test_likelihood.json", 1)
    paths += files.find("checkpoints/evaluation/*.json", _MOST_EVALUATIONS)
    found = []
    for path in paths:
        try:
            found.append(_evaluation(path.name, read_json(path, _LARGEST_JSON)))
        except (ValueError, KeyError, TypeError, AttributeError):
            files.notes.append(f"{path.name} is no evaluation that can be read")
    return found


def _evaluation(name: str, content: dict[str, Any]) -> Evaluation:
    """Raise unless everything that a table needs is there, and what is there is as it must be."""
    result, protocol = content.get("result", content), content.get("protocol", {})
    estimates = [result[each] for each in _ESTIMATES]
    numbers = [*result.get("kl_per_group", ()), *result.get("active_units", ())]
    optional = []
    for bound in result.get("importance_weighted", ()):
        estimates += [bound["nll"], bound["bits_per_dim"]]
        numbers.append(bound["samples"])
        optional.append(bound.get("effective_samples"))
    for estimate in estimates:
        numbers.append(estimate["mean"])
        optional.append(estimate.get("standard_error"))
    if None in map(reading, [*numbers, *(each for each in optional if each is not None)]):
        raise ValueError("something is no number")
    measured = {  # others are counts and names
        key: value for key, value in (content.get("samples") or {}).items()
        if isinstance(value, float) and reading(value) is not None
    }  # fmt: skip
    return Evaluation(name, str(protocol.get("split", "test")), result, measured, protocol)


def _pictures(files: _Files, name: str) -> list[tuple[int, Path]]:
    found = files.find(f"pictures/{name}_*.png", _MOST_PICTURES)
    steps = [re.fullmatch(rf"{name}_([0-9]{{1,12}})", file.stem) for file in found]
    return sorted((int(step[1]), file) for step, file in zip(steps, found, strict=True) if step)
