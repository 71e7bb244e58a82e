"""Reports of runs that come from anybody: nothing is followed, nothing becomes markup."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, PngImagePlugin

from nvae.report.__main__ import main, write_report
from nvae.report.record import reading, whole
from tests.test_report import HOSTILE, LIKELIHOOD, PROTOCOL, Page

HUGE = 10**4000
VALUES = (
    None, True, -1, 2.5, HUGE, 1e308, -1e308, 5e-324, math.nan, math.inf, "", "5", HOSTILE,
    "\ud800", "x" * 20_000, [], [1], [[[]]], {}, {"mean": 1}, {"a": {"b": [None]}},
)  # fmt: skip
EVALUATION = {"result": LIKELIHOOD, "samples": {"fid": 12.5}, "protocol": PROTOCOL}
CONFIG = {
    "name": "digits", "seed": 0, "data": {"name": "digits"}, "model": {"latent_channels": 4},
    "callbacks": {"pictures": {"temperatures": [0.7, 1.0]}},
}  # fmt: skip
START = {"step": 0, "command": ["train.py"], "versions": {"torch": "2"}, "device": "cpu",
         "machine": "m", "git": "c", "python": "3", "resumed_from": "x"}  # fmt: skip
METRICS = {"step": 3, "time": 1e9, "train/kl": 1.0, "valid_kl_group/00": 1.0,
           "valid_active_units/00": 2.0}  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside ``value``, and to itself."""
    yield ()
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ((key, *rest) for rest in places(entry))


def confused(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    """A copy of ``value`` with ``other`` at ``place``."""
    if not place:
        return other
    changed = copy.deepcopy(value)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = other
    return changed


def _json(value: Any) -> str:
    return json.dumps(value) + "\n"


FILES: dict[str, tuple[Any, Callable[[Any], str]]] = {
    "checkpoints/evaluation/best.json": (EVALUATION, _json),
    "test_likelihood.json": (LIKELIHOOD, _json),
    "config.yaml": (CONFIG, yaml.safe_dump),
    "starts.jsonl": (START, _json),
    "metrics.jsonl": (METRICS, _json),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name, (value, text) in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text(value))
    (folder / "pictures").mkdir()
    return folder


def _is_page(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    Page(text)
    assert "<script" not in text
    assert len(text) < 1_000_000


def _confuse(run: Path, name: str, every: int) -> int:
    value, text = FILES[name]
    cases = [(place, other) for place in places(value) for other in VALUES][::every]
    for place, other in cases:
        (run / name).write_text(text(confused(value, place, other)), errors="surrogatepass")
        _is_page(run)
    return len(cases)


@pytest.mark.parametrize("name", FILES)
def test_any_value_anywhere_costs_its_part_only(run: Path, name: str) -> None:
    assert _confuse(run, name, every=17) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_more_values_anywhere_cost_their_part_only(run: Path, name: str) -> None:
    """A step that shares no factor with the number of values, so that all of them come."""
    assert math.gcd(8, len(VALUES)) == 1
    assert _confuse(run, name, every=8) > 15


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"\xff\xfe", b"[" * 100_000, b"{\"a\":" * 100_000, b"1" * 10_000,
     b"- " * 5_000, b"a: &a [1]\nb: *a\n", b"x: !!timestamp x\n", b"x: !!int x\n", b"x: !!bool q\n",
     b"? [1]\n: 2\n", b"!!python/object/apply:os.system [ls]\n"],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_what_is_no_such_file_costs_its_part_only(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    _is_page(run)


@pytest.mark.parametrize(
    "name",
    [*FILES, "samples.png", "pictures/samples_1.png", "pictures/samples_\u00b2.png",
     "pictures/samples_" + "9" * 100 + ".png", "checkpoints/evaluation/other.json"],
)  # fmt: skip
@pytest.mark.parametrize("way", ["link", "relative link", "folder", "pipe", "loop", "device"])
def test_no_link_is_followed_out_of_the_folder(
    run: Path, tmp_path: Path, name: str, way: str
) -> None:
    """The private picture of the reader must not be in the page that goes back to the stranger."""
    private = tmp_path / "private"
    private.mkdir()
    for file, (value, text) in FILES.items():
        (private / Path(file).name).write_text(text(value).replace("digits", "SECRET"))
    Image.new("L", (57, 31), 7).save(private / "own.png")
    path = run / name
    path.unlink(missing_ok=True)
    target = private / (path.name if path.name in os.listdir(private) else "own.png")
    if way == "link":
        path.symlink_to(target)
    elif way == "relative link":
        path.symlink_to(os.path.relpath(target, path.parent))
    elif way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero")
    text = write_report(run).read_text(encoding="utf-8")
    assert 'width="57"' not in text
    assert "SECRET" not in text


def test_a_folder_of_pictures_that_lies_elsewhere_is_none(run: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    Image.new("L", (57, 31), 7).save(tmp_path / "private" / "samples_1.png")
    (run / "pictures").rmdir()
    (run / "pictures").symlink_to(tmp_path / "private")
    text = write_report(run).read_text(encoding="utf-8")
    assert "<img" not in text
    assert "not followed" in text


def test_the_page_replaces_a_link_and_not_what_it_leads_to(run: Path, tmp_path: Path) -> None:
    victim = tmp_path / ".bashrc"
    victim.write_text("mine")
    (run / "report.html").symlink_to(victim)
    with pytest.raises(SystemExit, match="2"):
        main([str(run)])
    assert victim.read_text() == "mine"


def test_pictures_are_real_and_of_bounded_size(run: Path) -> None:
    """Other formats, bombs and what else a PNG can carry do not go into the page."""
    pictures = run / "pictures"
    Image.new("RGB", (8, 8)).save(pictures / "samples_1.png", "GIF")
    (pictures / "samples_2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 100)
    Image.new("1", (40_000, 10)).save(pictures / "samples_3.png")
    Image.new("1", (20_000, 20_000)).save(pictures / "samples_4.png")
    extra = PngImagePlugin.PngInfo()
    extra.add_text("note", "SECRET" * 50_000)
    Image.new("L", (9, 8)).save(
        pictures / "samples_5.png", pnginfo=extra, icc_profile=b"x" * 400_000
    )
    Image.new("P", (3000, 1)).save(pictures / "samples_6.png")
    text = write_report(run).read_text(encoding="utf-8")
    assert text.count("<img") == 2
    assert text.count("cannot be read") == 4
    assert len(text) < 100_000


def test_many_readings_metrics_and_starts_are_bounded(run: Path, monkeypatch) -> None:
    monkeypatch.setattr("nvae.report.record._MOST_METRICS", 20)
    monkeypatch.setattr("nvae.report.record._MOST_READINGS", 100)
    monkeypatch.setattr("nvae.report.record._LONGEST_LINE", 10_000)
    line = {"step": 1, **{f"m{i}": 1.0 for i in range(50)}}
    lines = [_json({**line, "step": step}) for step in range(50)]
    (run / "metrics.jsonl").write_text("".join(lines) + "x" * 100_000)
    text = write_report(run).read_text(encoding="utf-8")
    assert text.count("<svg") == 20
    assert "only the first 100 readings count" in text
    assert "no more than 20 metrics" in text


def test_numbers_that_a_chart_can_show() -> None:
    assert [reading(v) for v in (1, 2.5, 5e-324, True, "1", None, math.nan, math.inf, HUGE)] == [
        1.0, 2.5, 0.0, None, None, None, None, None, None,
    ]  # fmt: skip
    assert [whole(v) for v in (3, -1, 2.0, True, HUGE, "3")] == [3, None, None, None, None, None]
