"""Heat maps over steps as inline SVG: one row a latent group."""

import math
from collections.abc import Sequence

from nvae.report.markup import Markup, element, number
from nvae.report.record import Point
from nvae.report.scales import thin, ticks

_COLUMNS = 120
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000, 52, 52, 18, 26
_ANCHORS = ((247, 249, 252), (158, 199, 230), (59, 130, 190), (17, 76, 140), (9, 29, 66))


def colour(share: float) -> str:
    """From near white (0) over blue to near black (1), as ``#rrggbb``."""
    place = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    i = min(int(place), len(_ANCHORS) - 2)
    mixed = (a + (place - i) * (b - a) for a, b in zip(_ANCHORS[i], _ANCHORS[i + 1], strict=True))
    return "#" + "".join(f"{round(c):02x}" for c in mixed)


def heat_map(
    title: str, unit: str, rows: Sequence[Sequence[Point]], *, largest: float | None = None
) -> Markup:
    """A figure with caption, scale and map; the last value stands beside every row.

    Colour goes with the square root, so that small values differ from none.

    Args:
        title: of the figure.
        unit: of the values, all >= 0.
        rows: readings of every group, coarsest first; none empty.
        largest: value of the darkest colour; None: the largest drawn.
    """
    drawn = [thin(row, _COLUMNS) for row in rows]
    top = max(bucket.mean for row in drawn for bucket in row) if largest is None else largest
    top = top if top > 0 else 1.0
    height = max(10, min(26, 420 // len(rows)))
    bottom = _TOP + height * len(rows)
    columns = max(len(row) for row in drawn)
    width = (_WIDTH - _LEFT - _RIGHT) / columns
    every = math.ceil(12 / height)
    parts = [_text("group", _LEFT - 8, 10, "end"), _text("last", _WIDTH - _RIGHT + 8, 10)]
    for index, row in enumerate(drawn):
        y = _TOP + index * height
        for column, bucket in enumerate(row):
            share = math.sqrt(max(bucket.mean, 0.0) / top)
            tip = f"group {index}, step {bucket.step:.0f}: {number(bucket.mean)} {unit}"
            parts.append(
                element(
                    "rect", element("title", tip), x=f"{_LEFT + column * width:.2f}", y=y,
                    width=f"{width + 0.3:.2f}", height=height, fill=colour(share),
                )
            )  # fmt: skip
        if index % every == 0:
            middle = y + height / 2
            parts.append(_text(str(index), _LEFT - 8, middle, "end", "0.35em"))
            parts.append(
                _text(number(rows[index][-1][1]), _WIDTH - _RIGHT + 8, middle, dy="0.35em")
            )
    parts += _steps(rows[0], drawn[0][0].step, drawn[0][-1].step, bottom)
    chart = element(
        "svg", *parts, viewBox=f"0 0 {_WIDTH} {bottom + _BOTTOM}", role="img",
        aria_label=f"{title} over steps",
    )  # fmt: skip
    caption = element(
        "figcaption", element("strong", title), " ", element("small", unit), _scale(top)
    )
    return element(
        "figure", caption, element("div", chart, class_="wide", tabindex=0), class_="map"
    )


def _steps(row: Sequence[Point], first: float, last: float, bottom: float) -> list[Markup]:
    """Step labels under the columns."""
    if last <= first:
        return [_text(f"step {number(row[0][0])}", _LEFT, bottom + 16)]
    span = _WIDTH - _LEFT - _RIGHT
    marks = []
    for step in ticks(first, last, about=6):
        # a column stands for equally many readings, whatever their distance in steps
        place = (sum(1 for s, _ in row if s < step) + 0.5) / len(row)
        marks.append(_text(number(step), _LEFT + min(place, 1.0) * span, bottom + 16, "middle"))
    return marks


def _scale(top: float) -> Markup:
    stops = ", ".join(f"{colour(math.sqrt(i / 16))} {100 * i / 16:.0f}%" for i in range(17))
    bar = element("i", class_="ramp", style=f"background:linear-gradient(90deg, {stops})")
    return element("div", "0 ", bar, f" {number(top)}", class_="legend scale")


def _text(content: str, x: float, y: float, anchor: str = "start", dy: str | None = None) -> Markup:
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", dy=dy, class_=anchor)
