"""HTML and SVG text; the one place where text of a run becomes markup, escaped."""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from nvae.files import read_bytes

_WIDEST = 2000
"""Pictures that are wider are reduced: the page holds them all."""

_LONGEST = 32_000
_MOST_PIXELS = 1 << 26
_LARGEST = 1 << 26
"""Sides, pixels and bytes of a picture; those of a run are far smaller."""

LONGEST_TEXT = 2000
"""Characters of one piece of a run's text; what is longer loses its middle."""


class Markup(str):
    """Text that is markup already; anything else is escaped."""


def escape(value: object) -> str:
    """For element content and quoted attributes."""
    if isinstance(value, Markup):
        return value
    return html.escape(_short(value), quote=True)


def _short(value: object) -> str:
    text = str(value)
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} ... {text[-half:]}"


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """``<tag attributes>content</tag>``; ``class_`` is class, other underscores are hyphens."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{pairs}>{''.join(escape(each) for each in content)}</{tag}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """One after another."""
    return Markup("\n".join(parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """The first column names the row; the table scrolls by itself where it is too wide."""
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    whole = element("table", top if any(head) else "", element("tbody", *body))
    return element("div", whole, class_="wide", tabindex=0)


def picture(path: Path, alternative: str) -> Markup:
    """A PNG within the page; pixels stay sharp. A file that is no picture is said to be none."""
    try:
        image = _read_png(read_bytes(path, _LARGEST))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return element("p", f"{path.name} cannot be read.", class_="missing")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup(
        f'<img alt="{escape(alternative)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/png;base64,{data}">'
    )


def _read_png(content: bytes) -> Image.Image:
    """The pixels alone: what else a file holds does not go on."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
        width, height = file.size
        if max(width, height) > _LONGEST or width * height > _MOST_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels")
        image = file.convert("L" if file.mode in ("1", "L") else "RGB")
    image.info.clear()
    if width > _WIDEST:
        image = image.resize((_WIDEST, max(1, round(height * _WIDEST / width))))
    return image


def number(value: float) -> str:
    """Four significant digits, thousands separated, no needless exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 3 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
