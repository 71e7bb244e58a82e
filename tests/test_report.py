import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from nvae.report.command import main, write_report
from nvae.report.curves import Line, line_chart
from nvae.report.heat_map import colour, heat_map
from nvae.report.markup import Markup, element, number, table
from nvae.report.record import read_run
from nvae.report.scales import log_ticks, shown_range, thin, ticks
from nvae.report.sections import duration, flat

HOSTILE = '<script>alert("x")</script>'


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "standard_error": 0.5}


LIKELIHOOD: dict[str, Any] = {
    "images": 300,
    "negative_elbo": estimate(76.98),
    "reconstruction": estimate(47.95),
    "kl": estimate(29.03),
    "negative_elbo_bits_per_dim": estimate(1.7354),
    "kl_per_group": [11.0, 4.9],
    "active_units": [3, 1],
    "latent_channels": 4,
    "importance_weighted": [
        {"samples": 100, "nll": estimate(73.2), "bits_per_dim": estimate(1.65),
         "effective_samples": 6.1},
    ],
}  # fmt: skip

PROTOCOL: dict[str, Any] = {
    "split": "valid", "weights": "ema", "data": {"name": HOSTILE}, "importance_samples": [1, 100],
    "seed": 3, "batch_norm": {"batches": 500, "temperature": 0.7},
    "samples": {"extractor": "inception", "generated": 5000, "temperature": 0.8},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What train.py and evaluate.py leave, with hostile text wherever text can come from."""
    folder = tmp_path / "digits"
    (folder / "pictures").mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(50, 550, 50):
        time = 1e9 + 2 * step
        lines.append({"step": step, "time": time, "train/negative_elbo": 100 - step / 10,
                      "train/kl": 20.0, f"train/{HOSTILE}": 1.0})  # fmt: skip
        lines.append({"step": step, "time": time, "valid/negative_elbo": 101 - step / 10,
                      "valid_kl_group/00": 5.0, "valid_kl_group/01": step / 100,
                      "valid_active_units/00": 4.0, "valid_active_units/01": 2.0})  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 550, "tra')
    config = {
        "name": HOSTILE, "seed": 0, "data": {"name": "digits", "citation": HOSTILE},
        "model": {"latent_channels": 4}, "callbacks": {"pictures": {"temperatures": [0.7, 1.0]}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    start = {"step": 0, "command": ["train.py", HOSTILE], "versions": {"torch": "2.15.0"}}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "test_likelihood.json").write_text(json.dumps(LIKELIHOOD))
    evaluated = {"result": LIKELIHOOD, "samples": {"fid": 12.5}, "protocol": PROTOCOL}
    (folder / "checkpoints" / "evaluation").mkdir(parents=True)
    (folder / "checkpoints" / "evaluation" / "best.json").write_text(json.dumps(evaluated))
    for step in range(50, 550, 50):
        for name in ("samples", "reconstructions"):
            image = Image.new("L", (16, 8), step % 255)
            image.save(folder / "pictures" / f"{name}_{step:08d}.png")
    for name in ("samples.png", "reconstructions.png"):
        Image.new("L", (32, 8)).save(folder / name)
    return folder


class Page(HTMLParser):
    """Tags and attributes of a page; fails where tags do not nest."""

    _VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)


def page_of(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    """No script, style sheet, font or picture from another place, no address at all."""
    text, page = page_of(run)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "http" not in text
    assert "@import" not in text
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)


def test_text_of_the_run_cannot_become_markup(run: Path) -> None:
    """Names of runs and metrics, commands and citations are whatever someone typed."""
    text, _ = page_of(run)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;") >= 5


def test_every_part_is_on_the_page(run: Path) -> None:
    text, page = page_of(run)
    for expected in (
        "Negative ELBO", "KL per group, validation", "Active units, validation",
        "of 4 latent channels", "Rows: temperature 0.7, 1.0", "8 of 10 are shown",
        "76.980", "1.6500", "12.5000", "valid, 300 images", "3 of 4", "2.15.0",
        "metrics.jsonl: 1 line(s) could not be read", "best validation -ELBO, nats, at step 500",
    ):  # fmt: skip
        assert expected in text, expected
    assert page.count("img") == 8 + 8 + 2
    # three curves and two maps, one cell for every group and reading
    assert page.count("svg") == 3 + 2
    assert text.count("<title>group ") == 2 * 2 * 10


def test_evaluations_can_be_told_apart(run: Path) -> None:
    folder = run / "checkpoints" / "evaluation"
    plain = {"split": "test", "weights": "raw", "importance_samples": [], "seed": 0,
             "batch_norm": "running statistics", "samples": 3, "data": None}  # fmt: skip
    (folder / "raw.json").write_text(json.dumps({"result": LIKELIHOOD, "protocol": plain}))
    (folder / "odd.json").write_text(json.dumps({"result": LIKELIHOOD, "protocol": {"seed": 7}}))
    text, _ = page_of(run)
    assert (
        "weights ema · batch norm recalibrated 500 at 0.7 · K 1, 100 · seed 3 · "
        "samples by inception · generated 5000 · temperature 0.8</p>"
    ) in text
    assert ">weights raw · batch norm running statistics · seed 0</p>" in text
    assert ">seed 7</p>" in text


@pytest.mark.parametrize("svg", ["chart", "map"])
def test_pictures_are_well_formed_xml(svg: str) -> None:
    points = [(i, float(i * i)) for i in range(1000)]
    figure = (
        line_chart("a & b", "nats", [Line("<x>", points, "c0")])
        if svg == "chart"
        else heat_map("a & b", "nats", [points, points])
    )
    assert ElementTree.fromstring(figure).find(".//svg") is not None


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    """A run that stopped before its first reading still has a page."""
    (tmp_path / "config.yaml").write_text("name: early\n")
    text, page = page_of(tmp_path)
    for word in ("No metrics", "No readings", "None were drawn", "None was made", "starts.jsonl"):
        assert word in text
    assert page.count("svg") == page.count("img") == 0


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("test_likelihood.json", '{"negative_elbo": {"mean": null}}', "test_likelihood.json is no"),
        ("test_likelihood.json", "[1]", "test_likelihood.json is no"),
        ("config.yaml", "a: [", "config.yaml could not be read"),
        ("config.yaml", "data: 3\ncallbacks: [1]\n", "Negative ELBO"),
        ("starts.jsonl", '{"step": 1, "versions": 3, "command": "x"}\n', "From step 1"),
        ("samples.png", "no picture", "samples.png cannot be read"),
        ("metrics.jsonl", '{"step": 1, "train/kl": NaN}\n3\n', "No metrics"),
    ],
)
def test_damaged_files_cost_their_part_only(run: Path, name: str, content: str, note: str) -> None:
    (run / name).write_text(content)
    assert note in page_of(run)[0]


def test_series_are_sorted_finite_and_later_readings_win(tmp_path: Path) -> None:
    """A resumed run writes some steps again."""
    lines = ['{"step": 2, "a": 1}', '{"step": 1, "a": 5}', '{"step": 2, "a": 3}',
             '{"step": 3, "a": Infinity}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(tmp_path).series == {"a": [(1, 5.0), (2, 3.0)]}


def test_a_pause_is_no_training_time(tmp_path: Path) -> None:
    times = [*range(0, 1000, 10), *range(90_000, 91_000, 10)]
    lines = [json.dumps({"step": i, "time": time}) for i, time in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_run(tmp_path).seconds == 1980


def test_groups_are_in_order_beyond_ninety_nine(tmp_path: Path) -> None:
    line = {"step": 1} | {f"valid_kl_group/{g:02d}": g for g in range(102)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    groups = read_run(tmp_path).groups("valid_kl_group")
    assert [row[0][1] for row in groups] == list(range(102))


def test_a_foreign_page_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A report may be replaced, anything else may not."""
    page = run / "report.html"
    page.write_text("<p>mine</p>")
    with pytest.raises(SystemExit, match="2"):
        main([str(run)])
    assert "no report" in capsys.readouterr().err
    assert page.read_text() == "<p>mine</p>"
    page.unlink()
    main([str(run)])
    main([str(run)])
    assert "nvae.report" in page.read_text()


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    folder = tmp_path / place
    if place == "empty":
        folder.mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*run.*\n", error)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == [0, 50, 100]
    assert ticks(3.1, 8.9) == [4, 6, 8]
    assert ticks(5, 5) == [5]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(20, 600) == [20, 50, 100, 200, 500]


def test_a_few_outliers_do_not_flatten_a_curve() -> None:
    low, high = shown_range([1.0 + i / 200 for i in range(200)] + [1e9])
    assert 0 <= low <= 1.1
    assert 1.9 < high < 3
    low, high = shown_range([3.0, 5.0])
    assert low < 3
    assert high > 5


def test_thinning_keeps_extremes_and_every_reading() -> None:
    points = [(i, float(i % 7)) for i in range(1000)]
    buckets = thin(points, 10)
    assert len(buckets) == 10
    assert {(b.low, b.high) for b in buckets} == {(0.0, 6.0)}
    assert sum(b.mean for b in buckets) / 10 == pytest.approx(sum(v for _, v in points) / 1000)
    assert [b.mean for b in thin(points[:3], 10)] == [0, 1, 2]


def test_curve_goes_from_corner_to_corner() -> None:
    """A rising line must rise on the page: SVG's y points down."""
    figure = line_chart("t", "", [Line("train", [(0, 1.0), (10, 2.0)], "c0")])
    found = re.search(r'class="line c0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', figure)
    assert found is not None
    x0, y0, x1, y1 = map(float, found.groups())
    assert x0 < x1
    assert y0 > y1


def test_colours_run_from_light_to_dark() -> None:
    shades = [sum(bytes.fromhex(colour(i / 10)[1:])) for i in range(11)]
    assert shades == sorted(shades, reverse=True)
    assert colour(-1) == colour(0)
    assert colour(7) == colour(1)


def test_markup_escapes_what_is_not_markup() -> None:
    assert element("p", "<a>", title='"') == '<p title="&quot;">&lt;a&gt;</p>'
    assert element("p", Markup("<br>"), class_="x") == '<p class="x"><br></p>'
    assert "<td>1 &lt; 2</td>" in table(("", "b"), [("a", "1 < 2")])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (76.604, "76.6"), (1.65, "1.65"), (0.00010393, "0.0001039"),
     (1234.5, "1,234"), (2.5e-5, "2.50e-5"), (31_000_000.0, "3.10e7"), (-5.25, "-5.25")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_durations_and_settings_are_readable() -> None:
    assert duration(42.4) == "42 s"
    assert duration(3600 * 26 + 300) == "1 d 2 h 5 min"
    assert flat({"a": {"b": None, "c": {"d": True}}, "e": [1]}) == [
        ("a.b", "null"), ("a.c.d", "true"), ("e", "[1]"),
    ]  # fmt: skip
