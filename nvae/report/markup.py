"""HTML and SVG text; the one place where text of a run becomes markup, escaped."""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

_WIDEST = 2000
"""Pictures that are wider are reduced: the page holds them all."""


class Markup(str):
    """Text that is markup already; anything else is escaped."""


def escape(value: object) -> str:
    """For element content and quoted attributes."""
    return value if isinstance(value, Markup) else html.escape(str(value), quote=True)


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
        with Image.open(path) as file:
            image: Image.Image = file.copy()
            if image.width > _WIDEST:
                image = image.resize((_WIDEST, round(image.height * _WIDEST / image.width)))
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
            width, height = image.size
    except (OSError, UnidentifiedImageError, SyntaxError):
        return element("p", f"{path.name} cannot be read.", class_="missing")
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup(
        f'<img alt="{escape(alternative)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
    )


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
