"""Blocks: many images on one stack.

The first draw from a posterior takes bits that must be there already. They are the first images of
the block itself, as PNG: the least number of them that fills the stack enough for one draw. Then
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

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae.codec.coder import WORD, EmptyStackError, Stack
from nvae.codec.latents import FINEST, Lattice
from nvae.codec.walk import Walk

Progress = Callable[[int], None]
"""Called with the number of images just done."""

LARGEST_BLOCK = 1 << 28
"""Bytes of a block's gray levels, one each."""

_FIXED = struct.Struct("<IIIIII8s")
"""Images, those of them that began the block, their PNG's bytes, runs of passes, bytes of the
lattices, words that are whitened for an image, digest of the gray levels."""
_RUN = struct.Struct("<HI")
_DIGEST = 8
_SLACK = 1.05
_TRIES = 6


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
    """Images ``(N, C, S, S)`` uint8, gray levels, as one block; inside ``walk.running()``.

    Where N images are too few for a chain, all of them begin it, and that is all.
    """
    batch = walk.settings.batch_size
    some = levels[torch.linspace(0, len(levels) - 1, min(batch, len(levels))).round().long()]
    lattices, draw_bits = walk.lattices(some)
    needed = draw_bits * _SLACK + 256
    for _ in range(_TRIES):
        starters, png = _starters(levels, needed)
        stack = Stack.holding(png)
        bits = stack.bits
        try:
            passes = _push_all(walk, stack, levels[starters:], lattices, needed, progress)
            break
        except EmptyStackError:  # images unlike those that were looked at
            needed *= 2
    else:
        starters, png = len(levels), _as_png(levels)
        stack, passes = Stack.holding(png), []
        bits = stack.bits
    runs = [(size, len(list(same))) for size, same in groupby(passes)]
    kept = _pack(lattices) if runs else b""
    fixed = _FIXED.pack(
        len(levels), starters, len(png), len(runs), len(kept), _words(needed), _digest(levels)
    )
    packed = b"".join(_RUN.pack(*run) for run in runs)
    block = fixed + packed + kept + stack.compressed()
    size = BlockSize(len(levels), starters, 8 * len(png), stack.bits - bits, draw_bits, len(block))
    return block, size


def decode_block(walk: Walk, block: bytes, progress: Progress | None = None) -> Tensor:
    """Inverse of :func:`encode_block`; inside ``walk.running()``.

    Raises:
        DamagedBlockError: the block is no block, or its images are not those that went in.
    """
    images, starters, png_bytes, count, kept, words, digest = _fixed_part(block, walk)
    start = _FIXED.size
    runs = [_RUN.unpack_from(block, start + i * _RUN.size) for i in range(count)]
    start += count * _RUN.size
    passes = [size for size, times in runs for size in [size] * times]
    try:
        levels = torch.empty(images, *walk.image_shape, dtype=torch.uint8)
        lattices = _unpack(block[start : start + kept], walk) if passes else []
        stack = Stack.of(block[start + kept :])
        end = images
        for number, size in reversed(list(enumerate(passes))):
            levels[end - size : end] = walk.pop(stack, size, lattices)
            stack.whiten(number, size * words)
            end -= size
            if progress is not None:
                progress(size)
        levels[:starters] = _from_png(stack.content(), png_bytes, starters, walk)
        if progress is not None:
            progress(starters)
    except (ValueError, FloatingPointError, OSError, SyntaxError, zlib.error) as error:
        raise DamagedBlockError(_WRONG) from error
    if _digest(levels) != digest:
        raise DamagedBlockError(_WRONG)
    return levels


_WRONG = (
    "it was not decoded to what was encoded, and nothing of it is given out: the file is damaged, "
    "or this processor or software computes other numbers"
)


def images_of(block: bytes) -> int:
    """The number that a block says.

    Raises:
        DamagedBlockError: it is too short to say one.
    """
    if len(block) < _FIXED.size:
        raise DamagedBlockError("it is cut short")
    return int(_FIXED.unpack_from(block)[0])


def _fixed_part(block: bytes, walk: Walk) -> tuple[int, int, int, int, int, int, bytes]:
    """Checked: the numbers fit each other and the block."""
    images_of(block)
    found: tuple[int, int, int, int, int, int, bytes] = _FIXED.unpack_from(block)
    images, starters, png_bytes, count, kept, _, _ = found
    rest = len(block) - _FIXED.size - count * _RUN.size - kept
    if rest < 0 or rest % WORD.itemsize or png_bytes > len(block):
        raise DamagedBlockError("it is cut short, or its lengths do not fit")
    if not images or images * int(np.prod(walk.image_shape)) > LARGEST_BLOCK:
        raise DamagedBlockError(f"it claims {images} images, which no block has")
    runs = (_RUN.unpack_from(block, _FIXED.size + i * _RUN.size) for i in range(count))
    sizes = list(runs)
    if any(not 1 <= size <= walk.settings.batch_size for size, _ in sizes) or (
        starters + sum(size * times for size, times in sizes) != images
    ):
        raise DamagedBlockError("its numbers of images do not fit each other")
    return found


def _push_all(
    walk: Walk,
    stack: Stack,
    levels: Tensor,
    lattices: Sequence[Lattice],
    needed: float,
    progress: Progress | None,
) -> list[int]:
    """Sizes of the passes, in the order of encoding, which is that of the images."""
    passes: list[int] = []
    done = 0
    while done < len(levels):
        affordable = max(1, int(stack.bits / needed))
        size = min(walk.settings.batch_size, affordable, len(levels) - done)
        stack.whiten(len(passes), size * _words(needed))
        walk.push(stack, levels[done : done + size], lattices)
        passes.append(size)
        done += size
        if progress is not None:
            progress(size)
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
    """``(n, C, S, S)`` as one PNG, images below each other."""
    n, channels, side, _ = levels.shape
    if channels == 3:
        picture = Image.fromarray(levels.movedim(1, -1).reshape(n * side, side, 3).numpy())
    else:
        picture = Image.fromarray(levels.reshape(n * channels * side, side).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _from_png(content: bytes, length: int, n: int, walk: Walk) -> Tensor:
    channels, side, _ = walk.image_shape
    if not length <= len(content) < length + WORD.itemsize:
        raise ValueError("the stack holds something else")
    picture = Image.open(io.BytesIO(content[:length]), formats=["PNG"])
    rows = n * side * (1 if channels == 3 else channels)
    if picture.size != (side, rows) or picture.mode != ("RGB" if channels == 3 else "L"):
        raise ValueError("the stack holds something else")
    found = torch.from_numpy(np.array(picture))
    if channels == 3:
        return found.view(n, side, side, 3).movedim(-1, 1)
    return found.view(n, channels, side, side)


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
