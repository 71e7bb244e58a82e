"""Pictures of scores: histograms of two or more sets, and likelihood maps beside their images.

matplotlib draws, and is imported where a figure is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nvae.files import replacing
from nvae.scores.separation import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 40
_TICKS = 4
_COLUMNS = 4
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "text.parse_math": False, "axes.titlesize": 9,
}  # fmt: skip


def save_histograms(path: Path, sets: Mapping[str, Scores]) -> None:
    """A panel for every score, a curve for every set, as PNG.

    Where values reach far, the axis is that of arcsinh with the first set's spread as its linear
    part, so that outliers do not flatten the rest.

    Args:
        path: of the PNG.
        sets: scores by the sets' names, the images that belong first; those of the first are drawn.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    own = next(iter(sets.values()))
    rows = -(-len(own) // _COLUMNS)
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(3 * _COLUMNS, 2.2 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
        for name, axes in zip(own, panels, strict=False):
            _histogram(axes, {each: scores[name] for each, scores in sets.items()})
            axes.set_title(f"{name}, nats")
        for axes in list(panels):
            axes.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(sets), frameon=False)
        _save(figure, path)


def _histogram(axes: "Axes", sets: Mapping[str, NDArray[np.float64]]) -> None:
    own, everything = next(iter(sets.values())), np.concatenate(list(sets.values()))
    spread = float(np.subtract(*np.quantile(own, (0.75, 0.25)))) or 1.0
    ends = np.arcsinh(np.quantile(everything, (0, 1)) / spread)
    edges = spread * np.sinh(np.linspace(ends[0], max(ends[1], ends[0] + 1e-3), _BINS + 1))
    axes.set_xscale("asinh", linear_width=spread)
    for number, (name, values) in enumerate(sets.items()):
        share = np.histogram(values, edges)[0] / len(values)
        axes.stairs(share, edges, fill=number == 0, alpha=0.4 if number == 0 else 1, label=name)
    places = spread * np.sinh(np.linspace(ends[0], ends[1], 2 * _TICKS + 1)[1::2])
    axes.set_xticks(sorted({float(f"{place:.2g}") for place in places}))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks([])


@dataclass(frozen=True)
class MapRow:
    """A row of N images, each above its map.

    Attributes:
        what: says which images these are; it is written beside the row.
        images: ``(N, 1 or 3, H, W)`` in [0, 1].
        maps: log-likelihood of every pixel, ``(N, H, W)``, nats.
        titles: one for every image, written above it.
    """

    what: str
    images: Tensor
    maps: NDArray[np.float64]
    titles: Sequence[str]


def save_maps(path: Path, rows: Sequence[MapRow]) -> None:
    """Rows of images and their maps of log-likelihood, all on one scale, as PNG."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    count = max(len(row.images) for row in rows)
    low = min(float(np.quantile(row.maps, 0.002)) for row in rows)
    high = max(float(row.maps.max()) for row in rows)
    with style.context(["default", _STYLE]):
        height, width = rows[0].images.shape[-2:]
        size = 1.3 * count + 1.2, (2.4 * height / width + 0.5) * len(rows)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(rect=(0.03, 0, 0.97, 1)))
        panels = figure.subplots(2 * len(rows), count, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        shown: Any = None
        for number, row in enumerate(rows):
            pictures = row.images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()
            for column, (picture, each, title) in enumerate(
                zip(pictures, row.maps, row.titles, strict=True)
            ):
                above, below = panels[2 * number : 2 * number + 2, column]
                above.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture,
                             cmap="gray", vmin=0, vmax=1)  # fmt: skip
                above.set_title(title)
                shown = below.imshow(each, cmap="magma", vmin=low, vmax=high)
            text = panels[2 * number, 0].annotate(
                row.what, (-0.15, -0.1), xycoords="axes fraction", rotation=90, ha="right",
                va="center",
            )  # fmt: skip
            text.set_in_layout(False)  # it would push image and map apart
        bar = figure.colorbar(shown, ax=panels, shrink=0.6, pad=0.02)
        bar.set_label("log p(pixel), nats")
        _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
