"""Pictures on disk: single images, grids with labels. Pillow does the encoding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvae.files import replacing

_GAP = 2
_LEAST_SIDE = 48
_PAPER = 255
_LINE = 128  # grey: neither black nor white pixels at an edge melt into it
_FONT_SIZE = 14


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """``(N, C, H, W)`` in [0, 1] to ``(N, H, W, C)`` 0..255, C = 1 or 3.

    Raises:
        ValueError: another number of channels or dimensions.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; pictures need (N, 1 or 3, H, W)"
        )
    pixels = images.detach().float().clamp(0, 1).mul(255).round()
    return pixels.permute(0, 2, 3, 1).to("cpu").numpy().astype(np.uint8)


def save_image(path: str | Path, image: Tensor) -> None:
    """One image ``(C, H, W)`` in [0, 1] at its own size, losslessly, atomically."""
    _save(_picture(to_uint8(image[None])[0]), path)


def save_grid(
    path: str | Path,
    images: Tensor | Sequence[Tensor],
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> None:
    """A grid of images, filled row by row; small ones are enlarged without interpolation.

    Args:
        path: PNG file; replaced atomically.
        images: ``(N, C, H, W)`` in [0, 1], or a sequence of ``(C, H, W)``.
        columns: images in a row; None: about as many as rows.
        row_labels: text left of every row.
        column_labels: text above every column.

    Raises:
        ValueError: no images, or labels that do not match rows or columns.
    """
    _save(grid(images, columns=columns, row_labels=row_labels, column_labels=column_labels), path)


def save_rows(
    path: str | Path,
    rows: Sequence[Tensor],
    labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
) -> None:
    """One labelled row for every entry of ``rows``, each ``(N, C, H, W)`` with the same N."""
    stacked = [image for row in rows for image in row]
    columns = len(rows[0]) if rows else 0
    if any(len(row) != columns for row in rows):
        raise ValueError(f"rows hold {[len(row) for row in rows]} images; all need as many")
    save_grid(path, stacked, columns=columns, row_labels=labels, column_labels=column_labels)


def save_grids_side_by_side(
    path: str | Path, grids: Sequence[Tensor], labels: Sequence[str], columns: int | None = None
) -> None:
    """One grid for every entry of ``grids``, from left to right, each under its label.

    Args:
        path: PNG file; replaced atomically.
        grids: ``(N, C, H, W)`` each.
        labels: text above every grid, one each.
        columns: of every grid.
    """
    if not grids or len(grids) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(grids)} grids; give one each")
    pictures = [grid(images, columns=columns) for images in grids]
    title = _FONT_SIZE + 2 * _GAP
    spacing = 6 * _GAP
    width = sum(p.width for p in pictures) + spacing * (len(pictures) - 1)
    height = title + max(p.height for p in pictures)
    canvas = Image.new(pictures[0].mode, (width, height), _white(pictures[0].mode))
    draw = ImageDraw.Draw(canvas)
    left = 0
    for picture, label in zip(pictures, labels, strict=True):
        draw.text((left + _GAP, _GAP), label, fill=_black(canvas.mode), font=_font())
        canvas.paste(picture, (left, title))
        left += picture.width + spacing
    _save(canvas, path)


def grid(
    images: Tensor | Sequence[Tensor],
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """The picture that :func:`save_grid` writes."""
    if not len(images):
        raise ValueError("no images for a grid")
    pixels = np.stack([enlarge(to_uint8(image[None])[0]) for image in images])
    count, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    for labels, places, name in ((row_labels, rows, "rows"), (column_labels, columns, "columns")):
        if labels is not None and len(labels) != places:
            raise ValueError(f"{len(labels)} labels for {places} {name}")
    cell_height, cell_width = height + _GAP, width + _GAP
    left = _label_width(row_labels)
    top = _FONT_SIZE + 2 * _GAP if column_labels else 0
    shape = (top + rows * cell_height + _GAP, left + columns * cell_width + _GAP, channels)
    canvas = np.full(shape, _PAPER, np.uint8)
    canvas[top:, left:] = _LINE
    for i, image in enumerate(pixels):
        y = top + (i // columns) * cell_height + _GAP
        x = left + (i % columns) * cell_width + _GAP
        canvas[y : y + height, x : x + width] = image
    picture = _picture(canvas)
    draw = ImageDraw.Draw(picture)
    ink = _black(picture.mode)
    for row, label in enumerate(row_labels or ()):
        y = top + row * cell_height + (cell_height - _FONT_SIZE) // 2
        draw.text((_GAP, y), label, fill=ink, font=_font())
    for column, label in enumerate(column_labels or ()):
        draw.text((left + column * cell_width + _GAP, _GAP), label, fill=ink, font=_font())
    return picture


def enlarge(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the pixels of a small ``(H, W, C)`` picture until one can see something."""
    factor = max(1, -(-_LEAST_SIDE // image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _label_width(labels: Sequence[str] | None) -> int:
    if not labels:
        return 0
    return int(max(_font().getlength(label) for label in labels)) + 3 * _GAP


def _white(mode: str) -> int | tuple[int, int, int]:
    return 255 if mode == "L" else (255, 255, 255)


def _black(mode: str) -> int | tuple[int, int, int]:
    return 0 if mode == "L" else (0, 0, 0)


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _save(picture: Image.Image, path: str | Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
