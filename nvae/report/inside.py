"""What a report believes of a run's folder, which may be anybody's.

Only regular files that lie in the folder are read, whatever names and links in it say; only numbers
that a chart can be drawn of are numbers.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvae.files import read_json

LARGEST_JSON = 1 << 24
"""Bytes of one evaluation; ours have some thousands."""

_LONGEST_LINE = 1 << 20
_MOST_LINES = 2_000_000
_LARGEST_NUMBER = 1e100


class RunFiles:
    """The files of one folder.

    Attributes:
        folder: of the run.
        notes: one line for everything that was not read.
    """

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

    def json(self, path: Path) -> Any:
        """The value of a small file.

        Raises:
            ValueError: it is no JSON, or too large.
            OSError: it cannot be read.
        """
        return read_json(path, LARGEST_JSON)

    def json_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a file that has one a line, one at a time; other lines are counted."""
        path = self.folder / name
        if not self.has(path):
            return
        damaged = 0
        with path.open("rb") as file:
            for _ in range(_MOST_LINES):
                line = file.readline(_LONGEST_LINE)
                if not line:
                    break
                entry = _object(line)
                if entry is None:  # a killed process was writing it
                    damaged += 1
                else:
                    yield entry
            else:
                self.notes.append(f"{name}: only the first {_MOST_LINES:,} lines were read")
        if damaged:
            self.notes.append(f"{name}: {damaged} line(s) could not be read")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


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


def number(value: Any) -> float:
    """A number that a table can show.

    Raises:
        ValueError: it is none.
    """
    found = reading(value)
    if found is None or math.isnan(found):
        raise ValueError("no number")
    return found
