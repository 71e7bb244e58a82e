"""Picture files to gray levels and back, without losing a bit.

A file fits a model when its size is the model's, its pixels are black and white, gray or RGB of 8
bits without transparency, and its values are gray levels of the model in one of :data:`VALUES`.
Nothing is converted that could not be converted back. Files are written as PNG.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.codec.container import ImageFile
from nvae.command_line import brief
from nvae.files import open_regular, replacing

LARGEST_FILE = 1 << 28
_ORIENTATION = 0x0112
_MODES = {"1": 1, "L": 1, "RGB": 3}
_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
_LONGEST_NAME = 1000
_LONGEST_PART = 250

VALUES: dict[str, Callable[[NDArray[np.int64], int], NDArray[np.int64]]] = {
    "full": lambda level, bits: (2 * 255 * level + 2**bits - 1) // (2 * (2**bits - 1)),
    "high": lambda level, bits: level << (8 - bits),
    "low": lambda level, bits: level,
}
"""How gray levels of b bits stand in 8 bits: stretched to 0..255 and rounded, as this package
writes pictures; in the upper bits; or as they are."""


class UnfitImageError(ValueError):
    """A file that the model cannot code; the message says why, without its name."""


@dataclass(frozen=True)
class Wanted:
    """What a model codes.

    Attributes:
        channels, side: of an image.
        bits: of a gray level.
    """

    channels: int
    side: int
    bits: int

    def __str__(self) -> str:
        kind = {1: "gray", 3: "RGB"}.get(self.channels, f"{self.channels} channels")
        return f"{self.side}x{self.side} {kind}, {self.bits} bits"


def read_image(path: Path, name: str, wanted: Wanted) -> tuple[Tensor, ImageFile]:
    """Gray levels ``(C, S, S)`` uint8 of a file, and how to write it again.

    Args:
        path: of the file.
        name: that it is to be restored under.
        wanted: what fits.

    Raises:
        ValueError: one line that names the file, says what it has and what is needed.
    """
    try:
        pixels, mode = _pixels(path, wanted)
        levels, values = _levels(pixels, wanted.bits)
        return torch.from_numpy(levels).movedim(-1, 0).contiguous(), ImageFile(name, mode, values)
    except UnfitImageError as error:
        raise ValueError(f"{path} {error}; the model codes {wanted}") from None


def _pixels(path: Path, wanted: Wanted) -> tuple[NDArray[np.uint8], str]:
    """``(S, S, C)`` of a file, and its mode."""
    try:
        with open_regular(path) as file:
            image = Image.open(file, formats=_KINDS)
            if image.size != (wanted.side, wanted.side):
                raise UnfitImageError(f"has {image.width}x{image.height} pixels")
            if getattr(image, "n_frames", 1) != 1:
                raise UnfitImageError(f"has {image.n_frames} frames")  # type: ignore[attr-defined]
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise UnfitImageError("is stored turned round, and that would be lost: turn it")
            image.load()
    except UnfitImageError:
        raise
    except Exception as error:  # PIL's decoders raise almost anything on damaged input
        reason = brief(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
        raise UnfitImageError(f"cannot be read: {reason}") from error
    if image.mode not in _MODES or "transparency" in image.info:
        what = "transparency" if "transparency" in image.info else f"mode {image.mode}"
        raise UnfitImageError(f"has {what}, and only 1, L and RGB come back as they were")
    array = np.asarray(image).astype(np.uint8) * (255 if image.mode == "1" else 1)
    array = array.reshape(wanted.side, wanted.side, -1)
    if array.shape[2] == wanted.channels:
        return array, image.mode
    if wanted.channels == 3:
        return np.repeat(array, 3, axis=2), image.mode
    if wanted.channels == 1 and (array == array[:, :, :1]).all():
        return array[:, :, :1], image.mode
    raise UnfitImageError(f"has {array.shape[2]} channels")


def _levels(pixels: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.uint8], str]:
    for name in VALUES:
        table = _table(name, bits)
        levels = np.searchsorted(table, pixels).clip(max=len(table) - 1)
        if (table[levels] == pixels).all():
            return levels.astype(np.uint8), name
    count = len(np.unique(pixels))
    raise UnfitImageError(
        f"has {count} values up to {int(pixels.max())} that are no {2**bits} gray levels"
    )


def _table(values: str, bits: int) -> NDArray[np.uint8]:
    return VALUES[values](np.arange(2**bits), bits).astype(np.uint8)


def to_picture(levels: Tensor, file: ImageFile, bits: int) -> Image.Image:
    """The picture of gray levels ``(C, S, S)`` uint8, in its file's mode.

    Raises:
        ValueError: mode or values are none of those that are known, or do not fit.
    """
    if file.mode not in _MODES or file.values not in VALUES:
        raise ValueError(f"mode {file.mode!r} or values {file.values!r} are unknown")
    pixels = _table(file.values, bits)[levels.movedim(0, -1).numpy()]
    channels = _MODES[file.mode]
    if pixels.shape[2] > channels:
        if (pixels != pixels[:, :, :1]).any():
            raise ValueError(f"it is colored, and its mode is {file.mode}")
        pixels = pixels[:, :, :1]
    elif pixels.shape[2] < channels:
        pixels = np.repeat(pixels, channels, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))
    return picture.point(lambda v: 255 * (v >= 128), mode="1") if file.mode == "1" else picture


def restored_name(name: str) -> str:
    """The path, below a folder, of the PNG that a file is restored as.

    Raises:
        ValueError: it leads out of the folder, or is no name that a file can have.
    """
    path = PurePosixPath(name)
    usable = (
        path.parts and len(name) <= _LONGEST_NAME and name.isprintable() and "\\" not in name
        and not path.is_absolute() and path.as_posix() == name
        and all(0 < len(part.encode()) <= _LONGEST_PART for part in path.parts)
        and ".." not in path.parts and ":" not in path.parts[0]
    )  # fmt: skip
    if not usable:
        raise ValueError(f"the file name {brief(repr(name), 100)} is refused")
    return path.as_posix() if path.suffix.lower() == ".png" else f"{path}.png"


def check_names(names: Iterable[str]) -> list[str]:
    """What files are restored as, one a name.

    Raises:
        ValueError: a name is refused, or two files would have one.
    """
    taken: dict[str, str] = {}
    for name in names:
        restored = restored_name(name)
        if restored in taken:
            raise ValueError(f"{taken[restored]} and {name} would both be restored as {restored}")
        taken[restored] = name
    return list(taken)


def write_image(path: Path, picture: Image.Image, *, overwrite: bool) -> None:
    """Write a PNG, atomically; a file that holds these very pixels already stays.

    Raises:
        ValueError: another file is there, and ``overwrite`` is False.
        OSError: it cannot be written.
    """
    if path.is_symlink() or (path.exists() and not overwrite):
        if not _is_same(path, picture):
            raise ValueError(f"{path} is there already and holds something else; overwrite=true")
        return
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def _is_same(path: Path, picture: Image.Image) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as found:
            same: bool = (found.mode, found.size) == (picture.mode, picture.size)
            return same and bool((np.asarray(found) == np.asarray(picture)).all())
    except (OSError, ValueError, SyntaxError):
        return False


def black_border(images: Tensor, inside: tuple[slice, slice]) -> bool:
    """Whether images ``(N, C, H, W)`` are 0 outside the window, which is not coded."""
    around = images.clone()
    around[..., *inside] = 0
    return not around.any()
