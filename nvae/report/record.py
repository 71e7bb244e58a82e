"""What a run's folder says about the run; whatever is not there is left out."""

import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

Point = tuple[int, float]

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
    quality: dict[str, Any]
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
        evaluations: oldest name first.
        samples: (step, PNG file), steps ascending.
        reconstructions: the same.
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
    notes: list[str]

    def settings(self, *names: str) -> dict[str, Any]:
        """A group of settings, from the outermost name inwards; empty where there is none."""
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def groups(self, prefix: str) -> list[list[Point]]:
        """Readings of a metric that every latent group has, coarsest first."""
        names = [name for name in self.series if re.fullmatch(rf"{prefix}/\d+", name)]
        return [self.series[name] for name in sorted(names, key=lambda n: int(n.split("/")[1]))]

    def file(self, name: str) -> Path | None:
        """A file of the folder if it is there."""
        path = self.path / name
        return path if path.is_file() else None


def read_run(path: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ValueError: no folder, or one that no run wrote to.
    """
    if not path.is_dir():
        raise ValueError(f"no run at {path}: it takes a run's folder, such as runs/digits")
    if not any((path / name).exists() for name in ("metrics.jsonl", "config.yaml")):
        raise ValueError(f"{path} is no run's folder: it has neither metrics.jsonl nor config.yaml")
    notes: list[str] = []
    lines = _json_lines(path / "metrics.jsonl", notes)
    return RunRecord(
        path=path,
        series=_series(lines),
        seconds=_seconds(lines),
        config=_config(path / "config.yaml", notes),
        starts=_json_lines(path / "starts.jsonl", notes),
        evaluations=_evaluations(path, notes),
        samples=_pictures(path / "pictures", "samples"),
        reconstructions=_pictures(path / "pictures", "reconstructions"),
        notes=notes,
    )


def _json_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a killed process was writing it
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} line(s) could not be read")
    return found


def _series(lines: list[dict[str, Any]]) -> dict[str, list[Point]]:
    readings: dict[str, dict[int, float]] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name in ("step", "time") or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                readings.setdefault(name, {})[step] = float(value)  # a resumed run's is the later
    return {name: sorted(points.items()) for name, points in readings.items()}


def _seconds(lines: list[dict[str, Any]]) -> float:
    """A gap of more than twenty times the usual one is a pause."""
    times = sorted(t for line in lines if isinstance(t := line.get("time"), int | float))
    gaps = sorted(later - t for t, later in pairwise(times))
    if not gaps:
        return 0.0
    usual = max(sum(gaps) / len(gaps), gaps[len(gaps) // 2])
    return sum(gap for gap in gaps if gap <= 20 * usual)


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if isinstance(config, dict):
        return config
    notes.append(f"{path.name} could not be read")
    return {}


def _evaluations(path: Path, notes: list[str]) -> list[Evaluation]:
    files = [path / "test_likelihood.json"]
    files += sorted((path / "checkpoints" / "evaluation").glob("*.json"))
    found = []
    for file in files:
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            result = content.get("result", content)
            protocol = content.get("protocol", {})
            _check_numbers(result)
            split = str(protocol.get("split", "test"))
            quality = content.get("samples") or {}
            found.append(Evaluation(file.name, split, result, quality, protocol))
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"{file.name} is no evaluation that can be read")
    return found


def _check_numbers(result: dict[str, Any]) -> None:
    """Raise unless everything that a table needs is there and a number."""
    estimates = [result[name] for name in _ESTIMATES]
    for bound in result.get("importance_weighted", ()):
        estimates += [bound["nll"], bound["bits_per_dim"]]
        float(bound["samples"])
    for estimate in estimates:
        float(estimate["mean"])


def _pictures(folder: Path, name: str) -> list[tuple[int, Path]]:
    found = []
    for file in folder.glob(f"{name}_*.png"):
        step = file.stem.removeprefix(f"{name}_")
        if step.isdigit():
            found.append((int(step), file))
    return sorted(found)
