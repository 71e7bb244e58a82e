"""What a run's folder says about the run; whatever is not there is left out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from nvae.files import read_yaml
from nvae.report.inside import RunFiles, number, reading, whole

Point = tuple[int, float]

_MOST_READINGS = 5_000_000
_MOST_METRICS = 2_000
_MOST_STARTS = 1_000
_MOST_EVALUATIONS = 200
_MOST_PICTURES = 100_000
_LATEST = 1e11
"""Seconds since 1970: the year 5138."""

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
    files = RunFiles(path)
    series, seconds = _metrics(files)
    starts = list(islice(files.json_lines("starts.jsonl"), _MOST_STARTS))
    finals = (path / name for name in ("samples.png", "reconstructions.png"))
    return RunRecord(
        path=path,
        series=series,
        seconds=seconds,
        config=_config(files),
        starts=starts,
        evaluations=_evaluations(files),
        samples=_pictures(files, "samples"),
        reconstructions=_pictures(files, "reconstructions"),
        finals={file.name: file for file in finals if files.has(file)},
        notes=files.notes,
    )


def _metrics(files: RunFiles) -> tuple[dict[str, list[Point]], float]:
    """Every metric's readings, and the seconds between them."""
    readings: dict[str, dict[int, float]] = {}
    times: list[float] = []
    count = 0
    for line in files.json_lines("metrics.jsonl"):
        time = reading(line.get("time"))
        if time is not None and abs(time) < _LATEST:
            times.append(time)
        step = whole(line.get("step"))
        if step is None:
            continue
        for name, value in line.items():
            found = None if name in ("step", "time") else reading(value)
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


def _seconds(times: Iterable[float]) -> float:
    """A gap of more than twenty times the usual one is a pause."""
    gaps = sorted(later - t for t, later in pairwise(sorted(times)))
    if not gaps:
        return 0.0
    usual = max(sum(gaps) / len(gaps), gaps[len(gaps) // 2])
    return sum(gap for gap in gaps if gap <= 20 * usual)


def _config(files: RunFiles) -> dict[str, Any]:
    path = files.folder / "config.yaml"
    if not files.has(path):
        return {}
    try:
        config = read_yaml(path, 1 << 20)
    except ValueError:
        config = None
    if isinstance(config, dict):
        return config
    files.notes.append(f"{path.name} could not be read")
    return {}


def _evaluations(files: RunFiles) -> list[Evaluation]:
    paths = [path for path in (files.folder / "test_likelihood.json",) if files.has(path)]
    found = []
    for path in paths + files.find("checkpoints/evaluation/*.json", _MOST_EVALUATIONS):
        try:
            found.append(_evaluation(path.name, files.json(path)))
        except (ValueError, KeyError, TypeError, AttributeError):
            files.notes.append(f"{path.name} is no evaluation that can be read")
    return found


def _evaluation(name: str, content: dict[str, Any]) -> Evaluation:
    """Raise unless everything that a table needs is there, and what is there is as it must be."""
    result, protocol = content.get("result", content), content.get("protocol", {})
    estimates = [result[each] for each in _ESTIMATES]
    for bound in result.get("importance_weighted", ()):
        estimates += [bound["nll"], bound["bits_per_dim"]]
        number(bound["samples"])
        _number_or_none(bound.get("effective_samples"))
    for estimate in estimates:
        number(estimate["mean"])
        _number_or_none(estimate.get("standard_error"))
    for each in ("kl_per_group", "active_units"):
        for value in result.get(each, ()):
            number(value)
    quality = {k: v for k, v in (content.get("samples") or {}).items() if reading(v) is not None}
    return Evaluation(name, str(protocol.get("split", "test")), result, quality, protocol)


def _number_or_none(value: Any) -> None:
    if value is not None:
        number(value)


def _pictures(files: RunFiles, name: str) -> list[tuple[int, Path]]:
    found = []
    for file in files.find(f"pictures/{name}_*.png", _MOST_PICTURES):
        step = re.fullmatch("[0-9]{1,12}", file.stem.removeprefix(f"{name}_"))
        if step:
            found.append((int(step[0]), file))
    return sorted(found)
