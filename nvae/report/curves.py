"""Line charts as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvae.report.markup import Markup, element, number
from nvae.report.record import Point
from nvae.report.scales import Bucket, log_ticks, shown_range, thin, ticks

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
MOST_POINTS = 300


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: in the legend.
        points: (step, value), steps ascending.
        colour: class of the stylesheet, ``c0`` to ``c3``.
    """

    label: str
    points: list[Point]
    colour: str


class _Axes:
    """From steps and values to coordinates."""

    def __init__(self, lines: Sequence[Line], log: bool) -> None:
        steps = [step for line in lines for step, _ in line.points]
        values = [value for line in lines for _, value in line.points]
        self.log = log and min(values) > 0
        self.first, self.last = min(steps), max(steps)
        self.constant = values[0] if min(values) == max(values) else None
        if self.log:
            self.low, self.high = min(values) / 1.1, max(values) * 1.1
        else:
            self.low, self.high = shown_range(values)
        self.cut = not (self.low <= min(values) and max(values) <= self.high)

    def x(self, step: float) -> float:
        share = (step - self.first) / ((self.last - self.first) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def value_ticks(self) -> list[float]:
        if self.constant is not None:
            return [self.constant]
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def line_chart(title: str, unit: str, lines: Sequence[Line], *, log: bool = False) -> Markup:
    """A figure with caption, legend (with every line's last value) and chart.

    Args:
        title: of the figure.
        unit: of the values; may be empty.
        lines: at least one, none empty.
        log: logarithmic values, where all are positive.
    """
    axes = _Axes(lines, log)
    clip = "clip-" + "".join(c if c.isalnum() else "-" for c in title.lower())
    frame = element(
        "clipPath",
        Markup(
            f'<rect x="{LEFT}" y="{TOP - 2}" width="{WIDTH - LEFT - RIGHT + 2}" '
            f'height="{HEIGHT - TOP - BOTTOM + 4}"/>'
        ),
        id=clip,
    )
    curves = [_curve(axes, line) for line in lines]
    chart = element(
        "svg", frame, *_grid(axes), element("g", *curves, clip_path=f"url(#{clip})"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} over steps",
    )  # fmt: skip
    remarks = [unit, "log scale" if axes.log else "", "outliers outside" if axes.cut else ""]
    legend = [
        element("span", element("i", class_=line.colour), f"{line.label} ",
                element("b", number(line.points[-1][1])), class_="key")
        for line in lines
    ]  # fmt: skip
    caption = element(
        "figcaption", element("strong", title), " ",
        element("small", ", ".join(remark for remark in remarks if remark)),
        element("div", *legend, class_="legend"),
    )  # fmt: skip
    return element("figure", caption, chart, class_="chart")


def _grid(axes: _Axes) -> list[Markup]:
    parts = []
    for value in axes.value_ticks():
        y = f"{axes.y(value):.1f}"
        parts.append(
            Markup(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        )
        parts.append(element("text", number(value), x=LEFT - 6, y=y, dy="0.35em", class_="end"))
    for step in ticks(axes.first, axes.last):
        if step != int(step):
            continue
        x = axes.x(step)
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(element("text", number(step), x=f"{x:.1f}", y=HEIGHT - 8, class_=anchor))
    return parts


def _curve(axes: _Axes, line: Line) -> Markup:
    buckets = thin(line.points, MOST_POINTS)
    if len(buckets) == 1:
        only = buckets[0]
        return Markup(
            f'<circle class="dot {line.colour}" r="3" cx="{axes.x(only.step):.1f}" '
            f'cy="{axes.y(only.mean):.1f}"/>'
        )
    path = "M" + "L".join(f"{axes.x(b.step):.1f} {axes.y(b.mean):.1f}" for b in buckets)
    drawn = f'<path class="line {line.colour}" d="{path}"/>'
    return Markup(_band(axes, line, buckets) + drawn)


def _band(axes: _Axes, line: Line, buckets: Sequence[Bucket]) -> str:
    """From smallest to largest of the readings that one point stands for."""
    if len(line.points) <= MOST_POINTS:
        return ""
    above = [f"{axes.x(b.step):.1f} {axes.y(b.high):.1f}" for b in buckets]
    below = [f"{axes.x(b.step):.1f} {axes.y(b.low):.1f}" for b in reversed(buckets)]
    return f'<path class="band {line.colour}" d="M{"L".join(above + below)}Z"/>'
