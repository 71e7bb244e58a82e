"""Pictures on disk: PNG of single images and labeled grids, and GIF by Pillow; MP4 by PyAV.

Every file is replaced as a whole. Images are (C, H, W) with values in [0, 1]; a :class:`View` makes
those of any other number of channels gray or color. What people look at has 8 bits.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvae.files import replacing

FORMATS = ("gif", "mp4")
"""Of animations."""

_GAP = 2
_LEAST_SIDE = 48
_PAPER = 255
_LINE = 128  # gray: neither black nor white pixels at an edge melt into it
_FONT_SIZE = 14


@dataclass(frozen=True)
class View:
    """What people see of an image.

    Attributes:
        channels: shown as red, green and blue, or one of them as gray, counted from 0. None: gray
            and color images as they are; of two channels the first as magenta and the second as
            green, ``[0, 1, 0]``; of more the first three.
        darkest: value that is shown as black.
        brightest: value that is shown as white.

    Raises:
        ValueError: one line that says what cannot be shown.
    """

    channels: Sequence[int] | None = None
    darkest: float = 0.0
    brightest: float = 1.0

    def __post_init__(self) -> None:
        if self.channels is not None and len(self.channels) not in (1, 3):
            raise ValueError(
                f"show_channels={list(self.channels)}: one channel is shown as gray, three as red, "
                "green and blue"
            )
        if not 0 <= self.darkest < self.brightest <= 1:
            raise ValueError(
                f"show_range=[{self.darkest:g},{self.brightest:g}]: it takes two numbers from 0 to "
                "1, first that of black, then that of white"
            )

    @classmethod
    def of_settings(cls, channels: Sequence[int] | None, limits: Sequence[float] | None) -> "View":
        """From ``show_channels`` and ``show_range`` of a configuration.

        Raises:
            ValueError: see the class.
        """
        if limits is None:
            return cls(channels)
        if len(limits) != 2:
            raise ValueError(f"show_range={list(limits)}: it takes two numbers, black and white")
        return cls(channels, *limits)

    def of(self, channels: int) -> list[int] | None:
        """The channels shown of an image's; None: all, as they are.

        Raises:
            ValueError: the image does not have one of those asked for.
        """
        if self.channels is None:
            return {1: None, 2: [0, 1, 0], 3: None}.get(channels, [0, 1, 2])
        for channel in self.channels:
            if not 0 <= channel < channels:
                raise ValueError(
                    f"show_channels={list(self.channels)}: the images have channels 0 to "
                    f"{channels - 1}"
                )
        return list(self.channels)

    def __call__(self, images: Tensor) -> Tensor:
        """``(..., C, H, W)`` in [0, 1] to ``(..., 1 or 3, H, W)``."""
        shown = self.of(images.shape[-3])
        if shown is not None:
            images = images[..., shown, :, :]
        if (self.darkest, self.brightest) == (0, 1):
            return images
        return ((images - self.darkest) / (self.brightest - self.darkest)).clamp(0, 1)


def needs_full_depth(image_shape: Sequence[int], bits: int) -> bool:
    """Whether a picture for people holds less than an image ``(C, H, W)`` of so many bits."""
    return bits > 8 or image_shape[0] not in (1, 3)


def save_full_depth(path: str | Path, image: Tensor, bits: int) -> Path:
    """One ``(C, H, W)`` image with all that it holds.

    Its levels, from 0 to 2^bits - 1: of gray as a PNG of 16 bits, of any other as a NumPy array
    ``(H, W, C)``. Read as data of so many bits they are what they were.

    Args:
        path: without suffix.
        image: to write.
        bits: of the model's pixels, 1 to 16.

    Returns:
        The file.
    """
    is_gray = image.shape[0] == 1
    levels = image.detach().float().clamp(0, 1).mul(2**bits - 1).round()
    array = levels.permute(1, 2, 0).to("cpu").numpy().astype(np.uint16 if bits > 8 else np.uint8)
    path = Path(path)
    file = path.with_name(path.name + (".png" if is_gray else ".npy"))
    if is_gray:
        _save(Image.fromarray(array[:, :, 0]), file)
        return file
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)
    return file


def save_image(path: str | Path, image: Tensor) -> None:
    """One image at its own size, losslessly."""
    _save(_picture(_pixels(image)), path)


def save_rows(
    path: str | Path,
    rows: Sequence[Tensor],
    labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
) -> None:
    """One labeled row for every entry of ``rows``, each ``(N, C, H, W)`` with the same N."""
    columns = len(rows[0]) if rows else 0
    if any(len(row) != columns for row in rows):
        raise ValueError(f"rows hold {[len(row) for row in rows]} images; all need as many")
    images = [image for row in rows for image in row]
    _save(grid(images, columns=columns, row_labels=labels, column_labels=column_labels), path)


def save_grids_side_by_side(
    path: str | Path, grids: Sequence[Tensor], labels: Sequence[str], columns: int | None = None
) -> None:
    """One grid for every entry of ``grids``, ``(N, C, H, W)`` each, with its label above."""
    if not grids or len(grids) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(grids)} grids; give one each")
    pictures = [grid(images, columns=columns) for images in grids]
    title, spacing = _FONT_SIZE + 2 * _GAP, 6 * _GAP
    widths = [
        max(picture.width, _text_width(label) + 2 * _GAP)
        for picture, label in zip(pictures, labels, strict=True)
    ]
    width = sum(widths) + spacing * (len(widths) - 1)
    height = title + max(picture.height for picture in pictures)
    canvas = Image.new(pictures[0].mode, (width, height), "white")
    left = 0
    for picture, label, own_width in zip(pictures, labels, widths, strict=True):
        _write(canvas, left + _GAP, _GAP, label)
        canvas.paste(picture, (left, title))
        left += own_width + spacing
    _save(canvas, path)


def grid(
    images: Tensor | Sequence[Tensor],
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """A grid of images, filled row by row; small ones are enlarged without interpolation.

    Args:
        images: all of one shape.
        columns: images in a row, or all where they are fewer; None: about as many as rows.
        row_labels: text left of every row.
        column_labels: text above every column.

    Raises:
        ValueError: no images, or labels that do not match rows or columns.
    """
    if not len(images):
        raise ValueError("no images for a grid")
    pixels = np.stack([_enlarged(_pixels(image)) for image in images])
    count, height, width, channels = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = -(-count // columns)
    for labels, places, name in ((row_labels, rows, "rows"), (column_labels, columns, "columns")):
        if labels is not None and len(labels) != places:
            raise ValueError(f"{len(labels)} labels for {places} {name}")
    cell_height, cell_width = height + _GAP, width + _GAP
    left = max(map(_text_width, row_labels)) + 3 * _GAP if row_labels else 0
    top = _FONT_SIZE + 2 * _GAP if column_labels else 0
    shape = (top + rows * cell_height + _GAP, left + columns * cell_width + _GAP, channels)
    canvas = np.full(shape, _PAPER, np.uint8)
    canvas[top:, left:] = _LINE
    for i, image in enumerate(pixels):
        y = top + (i // columns) * cell_height + _GAP
        x = left + (i % columns) * cell_width + _GAP
        canvas[y : y + height, x : x + width] = image
    picture = _picture(canvas)
    for row, label in enumerate(row_labels or ()):
        _write(picture, _GAP, top + row * cell_height + (cell_height - _FONT_SIZE) // 2, label)
    for column, label in enumerate(column_labels or ()):
        _write(picture, left + column * cell_width + _GAP, _GAP, label)
    return picture


def check_format(name: str) -> None:
    """Raise a ValueError unless animations of this format can be written here."""
    if name not in FORMATS:
        raise ValueError(f"animation={name!r} is unknown; allowed: {', '.join(FORMATS)}")
    if name == "mp4" and find_spec("av") is None:
        raise ValueError("animation=mp4 needs PyAV: pip install 'nvae[video]', or animation=gif")


def save_animation(path: str | Path, frames: Tensor, *, milliseconds: int = 80) -> None:
    """Play ``frames`` ``(N, C, H, W)`` there and back; small ones are enlarged.

    A GIF plays for ever; an MP4 (H.264) loses a little at sharp edges.

    Args:
        path: ends in ``.gif`` or ``.mp4``.
        frames: in order.
        milliseconds: for each.

    Raises:
        ValueError: no frames, or a format that cannot be written here.
    """
    path = Path(path)
    check_format(path.suffix[1:])
    if not len(frames):
        raise ValueError("no frames for an animation")
    there = [_enlarged(_pixels(frame)) for frame in frames]
    encode = _gif if path.suffix == ".gif" else _mp4
    encoded = encode(there + there[-2:0:-1], milliseconds)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def _gif(frames: Sequence[NDArray[np.uint8]], milliseconds: int) -> bytes:
    first, *others = map(_picture, frames)
    file = io.BytesIO()
    first.save(
        file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0
    )
    return file.getvalue()


def _mp4(frames: Sequence[NDArray[np.uint8]], milliseconds: int) -> bytes:
    import av

    height, width = frames[0].shape[:2]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1000, milliseconds))
        # color is stored at half the resolution, which needs even sides
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            rgb = np.broadcast_to(frame, (height, width, 3))
            even = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """``(C, H, W)`` in [0, 1] to ``(H, W, C)`` 0..255.

    Raises:
        ValueError: another number of channels or dimensions.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image has shape {tuple(image.shape)}; pictures need (1 or 3, H, W)")
    pixels = image.detach().float().clamp(0, 1).mul(255).round()
    return pixels.permute(1, 2, 0).to("cpu").numpy().astype(np.uint8)


def _enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat the pixels of a small ``(H, W, C)`` picture until one can see something."""
    side = math.isqrt(pixels.shape[0] * pixels.shape[1])  # as large as a square's
    factor = max(1, -(-_LEAST_SIDE // max(1, side)))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)


def _text_width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _write(picture: Image.Image, x: int, y: int, text: str) -> None:
    ImageDraw.Draw(picture).text((x, y), text, fill="black", font=_font())


def _save(picture: Image.Image, path: str | Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
