"""The figures of a report: matplotlib draws, the result is SVG for the inside of an HTML page.

matplotlib is imported where a figure is drawn: `--help` and a refused run do not wait for it.
Nothing of it is changed for others: no pyplot, and settings only while a figure is drawn.
"""

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nvae.report.record import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 300
MOST_COLUMNS = 120
MOST_CELLS = 20_000
"""Points of a curve, columns and cells of a heat map; more readings are drawn as means."""

# the page's stylesheet gives these names their colors; matplotlib draws with stand-ins
_NAMES = ("c0", "c1", "c2", "c3", "soft", "rule")
_COLORS = {name: f"#00000{i}" for i, name in enumerate(_NAMES, 1)}
_SOFT, _RULE = _COLORS["soft"], _COLORS["rule"]
_STYLE = {
    "svg.hashsalt": "nvae", "svg.fonttype": "none", "text.parse_math": False, "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _SOFT, "axes.titlecolor": _SOFT, "axes.labelcolor": _SOFT,
    "xtick.labelcolor": _SOFT, "ytick.labelcolor": _SOFT, "xtick.color": _RULE,
    "axes.edgecolor": _RULE, "grid.color": _RULE, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.axisbelow": True, "axes.spines.left": False,
    "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 12,
    "axes.titlelocation": "left", "axes.titley": 1.0, "ytick.major.size": 0,
    "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip


def line_chart(
    lines: Sequence[tuple[str, Sequence[Point]]], unit: str, ids: str, *, log: bool = False
) -> str:
    """Curves over steps, as an ``<svg>`` element of 400 x 240 pixels.

    More than ``MOST_POINTS`` readings become means of neighbors with a band from the smallest to
    the largest of them. A few outliers that would flatten the rest lie outside of the axis.

    Args:
        lines: color (``c0`` to ``c3``) and readings, steps ascending; no line is empty.
        unit: of the values; may be empty.
        ids: begins every id in the figure, so that the figures of a page do not share any.
        log: logarithmic values, where all are positive.
    """
    from matplotlib import style, ticker

    steps, values = np.concatenate([np.asarray(points, float) for _, points in lines]).T
    log = log and values.min() > 0
    low, high = (values.min() / 1.1, values.max() * 1.1) if log else shown_range(values)
    cut = values.min() < low or values.max() > high
    with style.context(["default", _STYLE]):
        figure, axes = _figure(400, 240, left=58, right=14, top=24, bottom=42)
        for color, points in lines:
            step, mean, least, most = thin(points, MOST_POINTS)
            if len(points) > len(step):
                axes.fill_between(step, least, most, color=_COLORS[color], alpha=0.2, linewidth=0)
            only = len(step) == 1
            axes.plot(step, mean, color=_COLORS[color], marker="o" * only, clip_on=not only)
        remarks = (unit, "log scale" if log else "", "outliers outside" if cut else "")
        axes.set_title(", ".join(filter(None, remarks)))
        axes.grid(axis="y")
        axes.set_yscale("log" if log else "linear")
        axes.set_ylim(low - (0 if log else 0.01 * (high - low)), high)  # room for a line at zero
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        if values.min() == values.max():
            axes.set_yticks([values[0]])
        elif log and high > 20 * low:
            subs = (1, 2, 5) if high < 1000 * low else (1,)
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=6))
        axes.yaxis.set_major_formatter(lambda value, _: number(value, 6))
        _step_axis(axes, steps.min(), steps.max(), ticks=5)
        return _svg(figure, ids)


def heat_map(
    rows: Sequence[Sequence[Point]], unit: str, ids: str, *, largest: float | None = None
) -> str:
    """One row a latent group over the steps, as an ``<svg>`` element 1100 pixels wide.

    Color goes with the square root, so that small values differ from none. The last reading stands
    beside the row; every cell has its value as title. A cell without a reading is left empty.

    Args:
        rows: readings of every group, coarsest first; none empty.
        unit: of the values, all >= 0.
        ids: begins every id in the figure.
        largest: value of the last color; None: the largest drawn.
    """
    from matplotlib import colors, style, ticker

    edges, means = _cells(rows)
    top = largest or max(float(np.nanmax(means)), 0.0) or 1.0
    count, left, above, width = len(rows), 58, 46, 970
    height = min(26 * count, max(420, min(10 * count, 4000)))
    with style.context(["default", _STYLE]):
        figure, axes = _figure(
            1100, height + above + 42, left=left, right=1100 - left - width, top=above, bottom=42
        )
        norm = colors.PowerNorm(0.5, 0, top, clip=True)
        mesh = axes.pcolormesh(edges, np.arange(count + 1), means, norm=norm, rasterized=True)
        axes.invert_yaxis()
        axes.set_title(unit)
        axes.text(1.01, 1 + 6 / height, "last", transform=axes.transAxes)
        axes.set_ylabel("group", labelpad=10)
        shown = range(0, count, -(-14 * count // height))
        axes.set_yticks([i + 0.5 for i in shown], [str(i) for i in shown])
        beside = axes.get_yaxis_transform()
        for i in shown:
            last = number(rows[i][-1][1])
            axes.text(1.01, i + 0.5, last, va="center_baseline", transform=beside)
        _step_axis(axes, edges[0], edges[-1], ticks=10)
        bar = axes.inset_axes((1 - 240 / width, 1 + 8 / height, 240 / width, 10 / height))
        scale = figure.colorbar(mesh, cax=bar, orientation="horizontal")
        scale.outline.set_visible(False)
        ticks = ticker.MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, top)
        bar.set_xticks([tick for tick in ticks if tick <= top])
        bar.xaxis.set_major_formatter(lambda value, _: number(value))
        bar.xaxis.set_ticks_position("top")
        x = left + width * (edges - edges[0]) / (edges[-1] - edges[0])
        tips = (
            f'<rect x="{x[j]:.1f}" y="{above + height * i / count:.1f}" '
            f'width="{x[j + 1] - x[j]:.1f}" height="{height / count:.1f}"><title>'
            f"group {i}, to step {edges[j + 1]:.0f}: {number(means[i, j])} {html.escape(unit)}"
            "</title></rect>"
            for i, j in np.argwhere(~np.isnan(means))
        )
        return _svg(figure, ids, f'<g class="tips">{"".join(tips)}</g>')


def thin(points: Sequence[Point], most: int) -> np.ndarray:
    """At most ``most`` columns (step, mean, smallest, largest), each of equally many readings."""
    parts = np.array_split(np.asarray(points, float), min(most, len(points)))
    return np.array([(*p.mean(0), p[:, 1].min(), p[:, 1].max()) for p in parts]).T


def shown_range(values: np.ndarray) -> tuple[float, float]:
    """From smallest to largest, unless a few outliers would flatten everything else.

    The range is cut where the middle 96 percent take less than a third of it.
    """
    low, inner_low, inner_high, high = np.quantile(values, (0, 0.02, 0.98, 1)).tolist()
    if inner_high > inner_low and high - low > 3 * (inner_high - inner_low):
        low, high = inner_low, inner_high
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    # nothing that cannot be negative gets an axis below zero
    return (low - margin if low < 0 or low > margin else 0.0), high + margin


def number(value: float, digits: int = 4) -> str:
    """Significant digits, all those before the point, and no needless exponent."""
    size = abs(value)
    digits = max(digits, len(f"{size:.0f}")) if size < 1e7 else digits
    return re.sub(r"e\+?(-?)0?", r"e\1", f"{value + 0.0:,.{digits}g}")


def _cells(rows: Sequence[Sequence[Point]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which columns begin and end [columns + 1], means [rows, columns]; NaN: no reading.

    A column stands for equally many steps that have readings, and ends at the last of them.
    """
    steps = np.unique([step for row in rows for step, _ in row]).astype(float)
    most = max(1, min(MOST_COLUMNS, MOST_CELLS // len(rows), len(steps)))
    ends = np.array([part[-1] for part in np.array_split(steps, most)])
    sums, counts = np.zeros((2, len(rows), most))
    for i, row in enumerate(rows):
        step, value = np.asarray(row, float).T
        column = np.searchsorted(ends, step)
        sums[i] = np.bincount(column, value, most)
        counts[i] = np.bincount(column, minlength=most)
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0] or 1)
    start = max(first, 0) if steps[0] > 0 else first
    return np.append(start, ends), np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _figure(
    width: int, height: int, *, left: int, right: int, top: int, bottom: int
) -> "tuple[Figure, Axes]":
    """A figure and its axes, all in pixels; images in it have twice as many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=144)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    return figure, figure.add_axes(box)


def _step_axis(axes: "Axes", first: float, last: float, ticks: int) -> None:
    from matplotlib import ticker

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlim(first, last) if last > first else axes.set_xlim(first - 1, first + 1)
    if first == last:
        axes.set_xticks([first])


def _svg(figure: "Figure", ids: str, more: str = "") -> str:
    """The figure as an element that may stand in a page beside others."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("</svg>", f"{more}</svg>")
    text = re.sub(r"\n +", "\n", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{ids}", text)
    for name, color in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text
