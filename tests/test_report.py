import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nvae.report.__main__ import main, write_report
from nvae.report.page import (
    LONGEST_TEXT,
    MOST_CHARTS,
    Markup,
    element,
    flat,
    picture,
    table,
)
from nvae.report.plots import MOST_COLUMNS, heat_map, line_chart, number, shown_range, thin
from nvae.report.record import Point, read_run

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
    assert "://" not in text
    assert "default-src 'none'" in text
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
    # every color of a figure follows the scheme, and no rule of one figure holds for the page
    assert "#00000" not in text
    assert page.count("style") == 1


def test_figures_share_no_ids(run: Path) -> None:
    """A clip path or a tick's mark that two figures share would be the first one's in both."""
    text, page = page_of(run)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {
        pair for name in ids for pair in ((name, ""), ("", name))
    }


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    """Whatever the process, its hash seed, the time, or the reader's own matplotlib settings."""
    settings = run / "matplotlibrc"
    settings.write_text("font.size: 40\naxes.facecolor: red\ntext.usetex: True\n")
    pages = []
    for seed, more in (("1", {}), ("2", {"MATPLOTLIBRC": str(settings)})):
        subprocess.run(
            [sys.executable, "-m", "nvae.report", str(run)],
            env={**os.environ, "PYTHONHASHSEED": seed, **more}, check=True,
        )  # fmt: skip
        pages.append((run / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_figures_leave_matplotlib_as_it_was(run: Path) -> None:
    before = dict(matplotlib.rcParams)
    page_of(run)
    assert dict(matplotlib.rcParams) == before


def test_help_does_not_wait_for_matplotlib() -> None:
    program = (
        "import sys; from nvae.report.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_a_page_has_a_bound(tmp_path: Path) -> None:
    """Metrics without end, and text without end."""
    line = {"step": 1} | {f"own/{i:03d}": 1.0 for i in range(MOST_CHARTS + 3)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "a" * 9000}))
    text, page = page_of(tmp_path)
    assert page.count("svg") == MOST_CHARTS
    assert "3 other metrics are not shown." in text
    assert "a" * (LONGEST_TEXT // 2) + " ... " in text
    assert "a" * (LONGEST_TEXT // 2 + 1) not in text


def test_a_picture_is_its_pixels_and_no_wider_than_the_page(tmp_path: Path) -> None:
    """What else a PNG carries stays out of the page."""
    info = PngInfo()
    info.add_text("comment", "secret" * 50)
    Image.new("P", (4000, 10)).save(tmp_path / "wide.png", pnginfo=info)
    text = picture(tmp_path / "wide.png", HOSTILE)
    ((tag, attributes),) = Page(text).tags
    assert (tag, attributes["alt"]) == ("img", HOSTILE)
    assert (attributes["width"], attributes["height"]) == ("2000", "5")
    assert b"secret" not in base64.b64decode(str(attributes["src"]).split(",")[1])


def test_pipes_and_other_formats_are_no_pictures(tmp_path: Path) -> None:
    """Nothing is waited for, and no decoder that PNG does not need is run."""
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("L", (4, 4)).save(tmp_path / "gif.png", "GIF")
    for name in ("pipe.png", "gif.png", "missing.png"):
        assert f"{name} cannot be read." in picture(tmp_path / name, "")


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


def texts(svg: str) -> list[str]:
    """What stands in a figure; fails where it is no XML."""
    return [str(each.text) for each in ElementTree.fromstring(svg).iter("text")]


def images(svg: str) -> list[np.ndarray]:
    """The pixels [height, width, 4] of a figure's images."""
    found = re.findall(r'data:image/png;base64,([^"]+)"[^>]*scale\(1 -1\)', svg)  # upside down
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))[::-1]
            for data in found]  # fmt: skip


def test_text_in_figures_is_plain_text() -> None:
    """Neither markup nor TeX."""
    points = [(1, 1.0), (2, 2.0)]
    assert "<b>$x^$ & y" in texts(line_chart([("c0", points)], "<b>$x^$ & y", "a-"))
    svg = heat_map([points], "<b>$x^$ & y", "a-")
    assert "<b>$x^$ & y" in texts(svg)
    assert "2 &lt;b&gt;$x^$ &amp; y</title>" in svg


GAP: list[Point] = [(i, float(i % 5)) for i in (*range(20), *range(5000, 5020))]
SHAPES: dict[str, list[Point]] = {
    "one reading": [(7, 3.0)],
    "one zero at the start": [(0, 0.0)],
    "two readings": [(1, 1.0), (2, 5.0)],
    "constant": [(i, 0.25) for i in range(30)],
    "all zero": [(i, 0.0) for i in range(30)],
    "negative": [(i, -i - 1.0) for i in range(30)],
    "a gap": GAP,
    "huge": [(1, -1e100), (2, 1e100), (3, 0.0)],
    "tiny": [(1, 1e-100), (2, 3e-100)],
    "close together": [(i, 1e6 + i * 1e-9) for i in range(10)],
    "late steps": [(10**12 + 1, 1.0), (10**12 + 2, 2.0)],
    "long": [(i, float(i * i)) for i in range(3000)],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["chart", "log chart", "map", "map of 40"])
def test_whatever_was_logged_is_drawn(shape: str, kind: str) -> None:
    points = SHAPES[shape]
    if kind.startswith("map"):
        rows = [points] * (40 if kind == "map of 40" else 1)
        svg = heat_map(rows, "nats", "a-")
        cells = re.findall(r"<title>group (\d+), to step \d+: [-\d.e,]+ nats</title>", svg)
        assert len(cells) == len(rows) * min(len(points), MOST_COLUMNS)
        assert len(images(svg)) == 2
    else:
        svg = line_chart([("c0", points), ("c1", points[:1])], "nats", "a-", log=kind != "chart")
        assert "var(--c0)" in svg
        assert "var(--c1)" in svg
    assert "nan" not in svg.replace("nats", "").lower().split("base64")[0]
    assert "step" in texts(svg)
    numbers = [text for text in texts(svg) if re.fullmatch(r"-?[\d.,]+(e-?\d+)?", text)]
    assert len(numbers) >= 2


def test_many_groups_and_readings_stay_small() -> None:
    points = [(i, float(i % 11)) for i in range(100_000)]
    assert len(line_chart([("c0", points)], "nats", "a-")) < 60_000
    assert len(heat_map([points[:2000]] * 1000, "nats", "a-")) < 4_000_000


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
    def labels(low: float, high: float, log: bool = False) -> list[str]:
        points = [(10 * i, low + i * (high - low) / 100) for i in range(101)]
        return texts(line_chart([("c0", points)], "", "a-", log=log))

    assert labels(0, 100)[:13] == [
        "0", "200", "400", "600", "800", "1,000", "step", "0", "20", "40", "60", "80", "100"
    ]  # fmt: skip
    assert labels(76.601, 76.609)[7:] == ["76.602", "76.604", "76.606", "76.608"]
    assert labels(0.5, 2000, True)[7:] == ["1", "10", "100", "1,000", "log scale"]
    assert labels(20, 600, True)[7:-1] == ["20", "50", "100", "200", "500"]
    assert labels(21, 29, True)[7:-1] == ["20", "25", "30"]


def test_a_few_outliers_do_not_flatten_a_curve() -> None:
    low, high = shown_range(np.array([1.0 + i / 200 for i in range(200)] + [1e9]))
    assert 0 <= low <= 1.1
    assert 1.9 < high < 3
    low, high = shown_range(np.array([3.0, 5.0]))
    assert low < 3
    assert high > 5


def test_thinning_keeps_extremes_and_every_reading() -> None:
    points = [(i, float(i % 7)) for i in range(1000)]
    step, mean, low, high = thin(points, 10)
    assert list(step) == [100 * i + 49.5 for i in range(10)]
    assert set(low) == {0.0}
    assert set(high) == {6.0}
    assert mean.mean() == pytest.approx(sum(v for _, v in points) / 1000)
    assert list(thin(points[:3], 10)[1]) == [0, 1, 2]


def test_bands_only_where_a_point_stands_for_several() -> None:
    points = [(i, float(i % 7)) for i in range(301)]
    assert "fill-opacity: 0.2" in line_chart([("c0", points)], "", "a-")
    assert "fill-opacity: 0.2" not in line_chart([("c0", points[:300])], "", "a-")


def test_curve_goes_from_corner_to_corner() -> None:
    """A rising line must rise on the page: SVG's y points down."""
    figure = line_chart([("c0", [(0, 1.0), (10, 2.0)])], "", "a-")
    found = re.search(r'd="M ([\d.]+) ([\d.]+)\s+L ([\d.]+) ([\d.]+)\s+"[^>]*var\(--c0\)', figure)
    assert found is not None
    x0, y0, x1, y1 = map(float, found.groups())
    assert x0 < x1
    assert y0 > y1


def test_colors_go_with_the_values() -> None:
    """From dark to light over the columns, the coarsest group on top, empty where nothing is."""
    rising = [(i, float(i)) for i in range(10)]
    image = images(heat_map([rising, [(5, 9.0)]], "nats", "a-"))[0].astype(int)
    height, width, _ = image.shape
    top, bottom = (
        image[place, width // 20 :: width // 10] for place in (height // 4, -height // 4)
    )
    shades = top[:, :3].sum(1)
    assert list(shades) == sorted(set(shades))
    assert list(bottom[:, 3] > 0) == [i == 5 for i in range(10)]
    assert list(bottom[5]) == list(top[9])


def test_cells_hold_the_means_of_their_readings() -> None:
    """120 columns for 240 readings, of which one group lacks every second."""
    whole = [(i, float(i)) for i in range(240)]
    svg = heat_map([whole, whole[::2]], "nats", "a-", largest=1000)
    cells = re.findall(r"<title>group (\d), to step (\d+): ([\d.]+) nats", svg)
    assert len(cells) == 240
    assert cells[:2] == [("0", "1", "0.5"), ("0", "3", "2.5")]
    assert cells[120:122] == [("1", "1", "0"), ("1", "3", "2")]
    assert texts(svg)[-6:] == ["239", "238", "nats", "0", "500", "1,000"]


def test_markup_escapes_what_is_not_markup() -> None:
    assert element("p", "<a>", title='"') == '<p title="&quot;">&lt;a&gt;</p>'
    assert element("p", Markup("<br>"), class_="x") == '<p class="x"><br></p>'
    assert "<td>1 &lt; 2</td>" in table(("", "b"), [("a", "1 < 2")])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (76.604, "76.6"), (1.65, "1.65"), (0.00010393, "0.0001039"),
     (1234.5, "1,234"), (2.5e-5, "2.5e-5"), (31_000_000.0, "3.1e7"), (-5.25, "-5.25"),
     (9_876_543.2, "9,876,543"), (-0.0, "0"), (1e100, "1e100")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_settings_are_readable() -> None:
    assert flat({"a": {"b": None, "c": {"d": True}}, "e": [1]}) == [
        ("a.b", "null"), ("a.c.d", "true"), ("e", "[1]"),
    ]  # fmt: skip
