"""Files of images to gray levels and back, without losing a bit.

A file fits a model when its size and channels are the model's and its values are gray levels of the
model in one of :data:`VALUES`. Nothing is converted that could not be converted back. What a PNG of
Pillow's can hold is written as PNG, everything else as an array of NumPy's.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nvae.codec.container import ImageFile
from nvae.codec.pixels import level_type
from nvae.command_line import brief
from nvae.data.decoding import KINDS, LARGEST_PICTURE, decode_deep
from nvae.data.pixels import Pixels
from nvae.data.readers.pictures import is_picture
from nvae.data.store import read_header
from nvae.files import open_regular, read_bytes, replacing

_ORIENTATION = 0x0112
_ARRAY_SUFFIX = ".npy"
_LONGEST_NAME = 1000
_LONGEST_PART = 250

PICTURES = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}
"""Modes of Pillow's that come back as PNG, and their channels."""
ARRAYS = {
    f"{kind} {axes}": (np.dtype(kind), axes)
    for kind in ("uint8", "int16", "uint16", "int32", "uint32", "int64")
    for axes in ("HW", "HWC")
}
"""Modes that come back as an array: type and axes."""
_DEPTHS = {"uint8": 8, "uint16": 16}
"""Bits of the types that are used to the full; the others hold levels as they are."""

VALUES: dict[str, Callable[[NDArray[np.int64], int, int], NDArray[np.int64]]] = {
    "full": lambda level, bits, depth: (
        (2 * (2**depth - 1) * level + 2**bits - 1) // (2 * (2**bits - 1))
    ),
    "high": lambda level, bits, depth: level << (depth - bits),
    "low": lambda level, bits, depth: level,
}
"""How gray levels of b bits stand in a depth of 8 or 16: stretched over all of it and rounded, as
this package writes pictures; in the upper bits; or as they are."""


class UnfitImageError(ValueError):
    """A file that the model cannot code; the message says why, without its name."""


@dataclass(frozen=True)
class Wanted:
    """What a model codes.

    Attributes:
        channels, height, width: of an image.
        bits: of a gray level.
    """

    channels: int
    height: int
    width: int
    bits: int

    def __str__(self) -> str:
        kind = {1: "gray", 3: "color"}.get(self.channels, f"{self.channels} channels")
        return f"{self.height}x{self.width} {kind}, {self.bits} bits"

    def check_size(self, height: int, width: int) -> None:
        """Raise an UnfitImageError for another one."""
        if (height, width) != (self.height, self.width):
            raise UnfitImageError(f"is {height}x{width} (height x width)")


def is_image_file(name: str) -> bool:
    """Whether a name is that of a picture or an array."""
    return is_picture(name) or (name.lower().endswith(_ARRAY_SUFFIX) and not name.startswith("."))


def read_image(path: Path, name: str, wanted: Wanted) -> tuple[Tensor, ImageFile]:
    """Gray levels ``(C, H, W)`` of a file, uint8 or int32, and how to write it again.

    Args:
        path: of the file.
        name: that it is to be restored under.
        wanted: what fits.

    Raises:
        ValueError: one line that names the file, says what it has and what is needed.
    """
    read = _read_array if path.suffix.lower() == _ARRAY_SUFFIX else _read_picture
    try:
        pixels, mode = read(path, wanted)
        if mode in ARRAYS and pixels.shape[2] != wanted.channels:
            raise UnfitImageError(f"has {pixels.shape[2]} channels")
        levels, values = _levels(_with_channels(pixels, wanted.channels), wanted.bits)
    except UnfitImageError as error:
        raise ValueError(f"{path} {error}; the model codes {wanted}") from None
    tensor = torch.from_numpy(levels).to(level_type(wanted.bits))
    return tensor.movedim(-1, 0).contiguous(), ImageFile(name, mode, values)


def _read_picture(path: Path, wanted: Wanted) -> tuple[Pixels, str]:
    """``(H, W, C)`` of a picture, and its mode."""
    try:
        data = read_bytes(path, LARGEST_PICTURE)
        kind = _check_header(data, wanted)
        picture = decode_deep(data)
    except UnfitImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged input
        reason = brief(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
        raise UnfitImageError(f"cannot be read: {reason}") from error
    if isinstance(picture, np.ndarray):
        wanted.check_size(*picture.shape[:2])
        return picture, _mode_of_array(picture, "HWC")
    pixels = np.asarray(picture)[..., None] if len(picture.getbands()) == 1 else np.asarray(picture)
    mode = picture.mode
    if mode == "I" and kind == "TIFF":
        return pixels, _mode_of_array(pixels, "HWC")
    if mode.startswith("I"):  # of 16 bits, whatever Pillow calls it
        return pixels.astype(np.uint16), "I;16"
    if mode not in PICTURES:
        raise UnfitImageError(f"has mode {mode}, and only {', '.join(PICTURES)} come back")
    return (pixels.astype(np.uint8) * 255 if mode == "1" else pixels), mode


def _check_header(data: bytes, wanted: Wanted) -> str | None:
    """Pillow's name of the format, or None where Pillow cannot read it and another library might.

    Raises:
        UnfitImageError: the picture has another size, or what would not come back.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=KINDS)
    except UnidentifiedImageError:
        return None
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and not (image.format == "TIFF" and frames == wanted.channels):
        raise UnfitImageError(f"has {frames} frames")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        raise UnfitImageError("is stored turned round, and that would be lost: turn it")
    wanted.check_size(image.height, image.width)
    if "transparency" in image.info:
        raise UnfitImageError("has transparency beside its pixels, which would be lost")
    return image.format


def _read_array(path: Path, wanted: Wanted) -> tuple[Pixels, str]:
    """``(H, W, C)`` of an array ``(H, W)`` or ``(H, W, C)`` in a file, and its mode."""
    try:
        with open_regular(path) as file:
            header = read_header(file)
            size = file.seek(0, 2)
            if size != header.bytes or size > LARGEST_PICTURE:
                raise ValueError(f"its header says {header.bytes} bytes, it has {size}")
            file.seek(header.offset)
            array = np.frombuffer(file.read(), header.dtype).reshape(header.shape)
    except (ValueError, OSError) as error:
        raise UnfitImageError(f"cannot be read: {error}") from error
    if array.ndim not in (2, 3):
        raise UnfitImageError(f"has shape {array.shape}, and (H, W) or (H, W, C) is an image's")
    wanted.check_size(*array.shape[:2])
    mode = _mode_of_array(array, "HWC"[: array.ndim])
    return array if array.ndim == 3 else array[:, :, None], mode


def _mode_of_array(array: Pixels, axes: str) -> str:
    mode = f"{array.dtype.name} {axes}"
    if mode not in ARRAYS:
        raise UnfitImageError(f"holds {array.dtype.name}, and only integers come back")
    return mode


def _with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Gray as color, or color whose channels are equal as gray: its own inverse.

    Raises:
        UnfitImageError: ``pixels`` ``(H, W, C)`` have other channels.
    """
    have = pixels.shape[2]
    if have == channels:
        return pixels
    if (have, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=2)
    if (have, channels) == (3, 1) and (pixels == pixels[:, :, :1]).all():
        return pixels[:, :, :1]
    raise UnfitImageError(f"has {have} channel{'s' * (have > 1)}")


def _levels(pixels: Pixels, bits: int) -> tuple[NDArray[np.int64], str]:
    """Gray levels, and how they stand in the file."""
    depth = _DEPTHS.get(pixels.dtype.name)
    if depth is not None and depth < bits:
        raise UnfitImageError(f"has {depth} bits")
    # of levels that fit in several ways the likeliest, which costs least: deep ones are as they are
    for values in VALUES if bits <= 8 else reversed(VALUES):
        if depth is None and values != "low":
            continue
        table = _table(values, bits, depth or 0)
        levels = np.searchsorted(table, pixels).clip(max=len(table) - 1)
        if (table[levels] == pixels).all():
            return levels, values
    raise UnfitImageError(
        f"has values from {pixels.min()} to {pixels.max()} that are no {2**bits} gray levels"
    )


@lru_cache(maxsize=8)
def _table(values: str, bits: int, depth: int) -> NDArray[np.int64]:
    """Of every gray level, the value in a file."""
    return VALUES[values](np.arange(2**bits), bits, depth)


def to_picture(levels: Tensor, file: ImageFile, bits: int) -> Image.Image | NDArray[Any]:
    """The picture or array of gray levels ``(C, H, W)``, in its file's mode.

    Raises:
        ValueError: mode or values are none of those that are known, or do not fit.
    """
    mode = file.mode
    if mode not in (*PICTURES, *ARRAYS) or file.values not in VALUES:
        raise ValueError(f"mode {mode!r} or values {file.values!r} are unknown")
    own = np.dtype(np.uint16 if mode == "I;16" else np.uint8)
    dtype, axes = ARRAYS.get(mode, (own, "HW" if PICTURES.get(mode) == 1 else "HWC"))
    depth = _DEPTHS.get(dtype.name)
    fits = file.values == "low" if depth is None else bits <= depth
    if not fits:
        raise ValueError(f"{bits} bits as {file.values!r} do not fit in mode {mode}")
    values = _table(file.values, bits, depth or 0)[levels.movedim(0, -1).numpy()]
    if int(values.max()) > np.iinfo(dtype.name).max:
        raise ValueError(f"the value {values.max()} does not fit in mode {mode}")
    own_channels = 1 if axes == "HW" else PICTURES.get(mode, values.shape[2])
    pixels = _with_channels(values.astype(dtype), own_channels)
    pixels = pixels[:, :, 0] if axes == "HW" else pixels
    if mode in ARRAYS:
        return pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture.point(lambda v: 255 * (v >= 128), mode="1") if mode == "1" else picture


def restored_name(file: ImageFile) -> str:
    """The path, below a folder, that a file is restored as: its own, if the suffix is right.

    Raises:
        ValueError: it leads out of the folder, or is no name that a file can have.
    """
    name = file.name
    path = PurePosixPath(name)
    usable = (
        path.parts and len(name) <= _LONGEST_NAME and name.isprintable() and "\\" not in name
        and not path.is_absolute() and path.as_posix() == name
        and all(0 < len(part.encode()) <= _LONGEST_PART for part in path.parts)
        and ".." not in path.parts and ":" not in path.parts[0]
    )  # fmt: skip
    if not usable:
        raise ValueError(f"the file name {brief(repr(name), 100)} is refused")
    suffix = ".png" if file.mode in PICTURES else _ARRAY_SUFFIX
    return name if path.suffix.lower() == suffix else f"{name}{suffix}"


def check_names(files: Iterable[ImageFile]) -> list[str]:
    """What files are restored as, one name each.

    Raises:
        ValueError: a name is refused, or two files would have one.
    """
    taken: dict[str, str] = {}
    for file in files:
        restored = restored_name(file)
        if restored in taken:
            raise ValueError(
                f"{taken[restored]} and {file.name} would both be restored as {restored}"
            )
        taken[restored] = file.name
    return list(taken)


def write_image(path: Path, picture: Image.Image | NDArray[Any], *, overwrite: bool) -> None:
    """Write a PNG or an array, atomically; a file that holds these very pixels already stays.

    Raises:
        ValueError: another file is there, and ``overwrite`` is False; or a link to one.
        OSError: it cannot be written.
    """
    if path.is_symlink() or (path.exists() and not overwrite):
        if not _is_same(path, picture):
            advice = "remove the link" if path.is_symlink() else "overwrite=true"
            raise ValueError(f"{path} is there already and holds something else; {advice}")
        return
    with replacing(path) as temporary:
        if isinstance(picture, Image.Image):
            picture.save(temporary, "PNG", optimize=True)
        else:
            temporary.write_bytes(_npy(picture))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _is_same(path: Path, picture: Image.Image | NDArray[Any]) -> bool:
    try:
        if not isinstance(picture, Image.Image):
            own = _npy(picture)
            return read_bytes(path, len(own)) == own
        with Image.open(io.BytesIO(read_bytes(path, LARGEST_PICTURE)), formats=["PNG"]) as found:
            same: bool = found.size == picture.size and _plain(found.mode) == _plain(picture.mode)
            return same and bool((np.asarray(found) == np.asarray(picture)).all())
    except (OSError, ValueError, SyntaxError):
        return False


def _plain(mode: str) -> str:
    """Pillow before 11 opens 16 bits of gray as I."""
    return "I" if mode.startswith("I") else mode
