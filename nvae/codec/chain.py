"""Blocks: many images on one stack.

The first draw from a posterior takes bits that must be there already. They are the first images of
the block itself, as one PNG: as few of them as fill the stack enough for one draw. Then
passes grow with the stack, one image at first, until they fill a batch, so that the batch costs no
more of such bits than one image. Decoding goes backwards, and what remains on the stack at the end
is that PNG again.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae.codec.coder import WORD, EmptyStackError, Stack
from nvae.codec.latents import FINEST, Lattice
from nvae.codec.pixels import level_type
from nvae.codec.walk import Walk

Progress = Callable[[int], None]
"""Called with the number of images just done."""

LARGEST_BLOCK = 1 << 26
"""Gray levels of a block, all of which may be in its PNG: of more pixels Pillow warns."""

_FIXED = struct.Struct("<IIIIII8s")
_RUN = struct.Struct("<HI")
_DIGEST = 8
_SLACK = 1.05
_TRIES = 6


_OF_DECODING = (
    *(ValueError, FloatingPointError, OSError, SyntaxError, zlib.error),
    Image.DecompressionBombError,
)
_WRONG = (
    "it was not decoded to what was encoded, and nothing of it is given out: the file is damaged, "
    "or this processor or software computes other numbers"
)


class _Fixed(NamedTuple):
    """The part of a block that has one length.

    Attributes:
        images: of the block.
        starters: those of them that began it.
        png_bytes: of their PNG.
        runs: of passes of one size.
        lattice_bytes: of the lattices, packed.
        words: that are whitened for an image.
        digest: of the gray levels.
    """

    images: int
    starters: int
    png_bytes: int
    runs: int
    lattice_bytes: int
    words: int
    digest: bytes


class DamagedBlockError(ValueError):
    """A block does not give back the images that went in."""


@dataclass(frozen=True)
class BlockSize:
    """Where a block's bits are.

    Attributes:
        images: of the block.
        starters: those of them that began it.
        starter_bits: of their PNG.
        chain_bits: that the other images added to the stack: their net size.
        first_draw_bits: about what one image takes before it gives anything back.
        bytes: of the whole block.
    """

    images: int
    starters: int
    starter_bits: int
    chain_bits: int
    first_draw_bits: float
    bytes: int


def encode_block(
    walk: Walk, levels: Tensor, progress: Progress | None = None
) -> tuple[bytes, BlockSize]:
    """Images ``(N, C, h, w)``, gray levels, as one block; inside ``walk.running()``.

    Where N images are too few for a chain, all of them begin it, and that is all.
    """
    reported = 0

    def report(done: int) -> None:
        """A try that was broken off has reported its images already."""
        nonlocal reported
        if progress is not None and done > reported:
            progress(done - reported)
            reported = done

    batch = walk.settings.batch_size
    some = levels[torch.linspace(0, len(levels) - 1, min(batch, len(levels))).round().long()]
    lattices, draw_bits = walk.lattices(some)
    needed = draw_bits * _SLACK + 256
    for _ in range(_TRIES):
        starters, png = _starters(levels, needed)
        stack = Stack.holding(png)
        bits = stack.bits
        try:
            passes = _push_all(walk, stack, levels, starters, lattices, needed, report)
            break
        except EmptyStackError:  # images unlike those that were looked at
            needed *= 2
    else:
        starters, png = len(levels), _as_png(levels)
        stack, passes = Stack.holding(png), []
        bits = stack.bits
    report(len(levels))
    runs = [(size, len(list(same))) for size, same in groupby(passes)]
    kept = _pack(lattices) if runs else b""
    fixed = _Fixed(
        len(levels), starters, len(png), len(runs), len(kept), _words(needed), _digest(levels)
    )
    packed = b"".join(_RUN.pack(*run) for run in runs)
    block = _FIXED.pack(*fixed) + packed + kept + stack.compressed()
    size = BlockSize(len(levels), starters, 8 * len(png), stack.bits - bits, draw_bits, len(block))
    return block, size


def decode_block(walk: Walk, block: bytes, progress: Progress | None = None) -> Tensor:
    """Inverse of :func:`encode_block`; inside ``walk.running()``.

    Raises:
        DamagedBlockError: the block is no block, or its images are not those that went in.
    """
    fixed, runs = _read_lengths(block, walk)
    start = _FIXED.size + len(runs) * _RUN.size
    lattices_end = start + fixed.lattice_bytes
    passes = [size for size, times in runs for size in [size] * times]
    try:
        levels = torch.empty(fixed.images, *walk.image_shape, dtype=level_type(walk.bits))
        lattices = _unpack(block[start:lattices_end], walk) if passes else []
        stack = Stack.of(block[lattices_end:])
        end = fixed.images
        for number, size in reversed(list(enumerate(passes))):
            levels[end - size : end] = walk.pop(stack, size, lattices)
            stack.whiten(number, size * fixed.words)
            end -= size
            if progress is not None:
                progress(size)
        levels[:end] = _from_png(stack.content(), fixed.png_bytes, end, walk)
        if progress is not None:
            progress(end)
    except _OF_DECODING as error:
        raise DamagedBlockError(_WRONG) from error
    if _digest(levels) != fixed.digest:
        raise DamagedBlockError(_WRONG)
    return levels


def images_of(block: bytes) -> int:
    """The number that a block says.

    Raises:
        DamagedBlockError: it is too short to say one.
    """
    if len(block) < _FIXED.size:
        raise DamagedBlockError("it is cut short")
    return _Fixed(*_FIXED.unpack_from(block)).images


def _read_lengths(block: bytes, walk: Walk) -> tuple[_Fixed, list[tuple[int, int]]]:
    """The fixed part, and every run's size and number of passes; they fit the block's length."""
    images_of(block)
    fixed = _Fixed(*_FIXED.unpack_from(block))
    rest = len(block) - _FIXED.size - fixed.runs * _RUN.size - fixed.lattice_bytes
    if rest < 0 or rest % WORD.itemsize or fixed.png_bytes > len(block):
        raise DamagedBlockError("it is cut short, or its lengths do not fit")
    if not fixed.images or fixed.images * prod(walk.image_shape) > LARGEST_BLOCK:
        raise DamagedBlockError(f"it claims {fixed.images} images, which no block has")
    end = _FIXED.size + fixed.runs * _RUN.size
    runs = list(_RUN.iter_unpack(block[_FIXED.size : end]))
    if any(not 1 <= size <= walk.settings.batch_size for size, _ in runs) or (
        fixed.starters + sum(size * times for size, times in runs) != fixed.images
    ):
        raise DamagedBlockError("its numbers of images do not fit each other")
    return fixed, runs


def _push_all(
    walk: Walk,
    stack: Stack,
    levels: Tensor,
    done: int,
    lattices: Sequence[Lattice],
    needed: float,
    report: Callable[[int], None],
) -> list[int]:
    """Code the images from number ``done`` on.

    Returns:
        Sizes of the passes, in the order of encoding, which is that of the images.
    """
    passes: list[int] = []
    while done < len(levels):
        affordable = max(1, int(stack.bits / needed))
        size = min(walk.settings.batch_size, affordable, len(levels) - done)
        stack.whiten(len(passes), size * _words(needed))
        walk.push(stack, levels[done : done + size], lattices)
        passes.append(size)
        done += size
        report(done)
    return passes


def _words(bits: float) -> int:
    """That the draw of an image takes, in a pass of which the stack affords so many."""
    return int(bits) // (8 * WORD.itemsize) + 1


def _starters(levels: Tensor, needed: float) -> tuple[int, bytes]:
    """The least number of images whose PNG has the bits needed, and it; at most all of them."""
    low, high = 0, 1  # `low` are too few
    while high < len(levels) and 8 * len(_as_png(levels[:high])) < needed:
        low, high = high, 2 * high
    high = min(high, len(levels))
    while high - low > 1:
        middle = (low + high) // 2
        if 8 * len(_as_png(levels[:middle])) < needed:
            low = middle
        else:
            high = middle
    return high, _as_png(levels[:high])


def _as_png(levels: Tensor) -> bytes:
    """``(n, C, h, w)`` as one PNG, images below each other.

    8-bit color is one picture of color; all else is gray, with the channels below each other too.
    """
    if _is_color(levels.shape[1], levels.dtype):
        levels = levels.movedim(1, -1).flatten(0, 1)
    else:
        levels = levels.flatten(0, 2)
    pixels = levels.contiguous().numpy()
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16))
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _is_color(channels: int, dtype: torch.dtype) -> bool:
    return channels == 3 and dtype == torch.uint8


def _from_png(content: bytes, length: int, n: int, walk: Walk) -> Tensor:
    channels, height, width = walk.image_shape
    dtype = level_type(walk.bits)
    is_color = _is_color(channels, dtype)
    if not length <= len(content) < length + WORD.itemsize:
        raise ValueError("the stack holds something else")
    picture = Image.open(io.BytesIO(content[:length]), formats=["PNG"])
    # Pillow before 11 opens 16 bits of gray as I
    modes = ("RGB",) if is_color else ("L",) if dtype == torch.uint8 else ("I;16", "I")
    rows = n * height * (1 if is_color else channels)
    if picture.size != (width, rows) or picture.mode not in modes:
        raise ValueError("the stack holds something else")
    found = torch.from_numpy(np.array(picture).astype(np.int32)).to(dtype)
    if is_color:
        return found.view(n, height, width, 3).movedim(-1, 1)
    return found.view(n, channels, height, width)


def _pack(lattices: Sequence[Lattice]) -> bytes:
    bits = torch.cat([each.bits for each in lattices]).to(torch.uint8)
    return zlib.compress(bits.numpy().tobytes(), 9)


def _unpack(packed: bytes, walk: Walk) -> list[Lattice]:
    widths = [shape[0] for shape in walk.model.latent_shapes]
    decompressor = zlib.decompressobj()
    content = decompressor.decompress(packed, sum(widths) + 1)
    bits = torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int64))
    if len(bits) != sum(widths) or bits.max() > FINEST:
        raise ValueError("the lattices do not fit the model")
    return [Lattice(part) for part in bits.split(widths)]


def _digest(levels: Tensor) -> bytes:
    return hashlib.blake2b(levels.contiguous().numpy().tobytes(), digest_size=_DIGEST).digest()
