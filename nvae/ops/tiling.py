"""How the depthwise kernels cut a tensor up: pure functions of its shape and the device's limits.

A block stages a tile with its halo in shared memory, so a tile should be large (the halo is read
twice) and still leave room for two or three blocks a multiprocessor (one waits while another
computes). The kernels' register needs, hence threads and blocks, were read off the machine code
(docs/kernels.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from nvae.ops.cuda import DeviceLimits

MAX_KERNEL = 11
RESERVED_SHARED = 1024  # what the system takes of every block's shared memory
CHANNELS = 32  # of a block; a thread takes two
TUNED_KERNEL = 5  # up to this size the weights stay in registers


@dataclass(frozen=True)
class Shape:
    """One depthwise convolution: input ``(b, c, h, w)``, kernel size k, stride s."""

    b: int
    c: int
    h: int
    w: int
    k: int
    s: int

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return -(-self.h // self.s), -(-self.w // self.s)


@dataclass(frozen=True)
class Tiling:
    """The constants a depthwise kernel is compiled with, and its launch.

    Attributes:
        channels: channels of a block (CB).
        images: images of a block (NB).
        tile: its height and width (TH, TW).
        patch: what a thread computes at a time (PH, PW).
        threads: threads of a block.
        min_blocks: blocks a multiprocessor has to hold; caps the registers.
        shared: bytes of shared memory.
        grid: (tiles down, tiles across, units, rows); the units (groups of images times tiles) of
            one channel block are shared by ``rows`` blocks.
    """

    channels: int
    images: int
    tile: tuple[int, int]
    patch: tuple[int, int]
    threads: int
    min_blocks: int
    shared: int
    grid: tuple[int, int, int, int]

    def macros(self) -> dict[str, int]:
        """The constants, by the names the kernels use."""
        return {
            "CB": self.channels, "NB": self.images, "TH": self.tile[0], "TW": self.tile[1],
            "PH": self.patch[0], "PW": self.patch[1], "THREADS": self.threads,
            "MIN_BLOCKS": self.min_blocks,
        }  # fmt: skip


def channel_blocks(c: int, channels: int) -> int:
    """Blocks side by side."""
    return -(-c // channels)


@cache
def forward_tiling(shape: Shape, limits: DeviceLimits, element_bytes: int) -> Tiling:
    """Tiling of ``depthwise_forward.cu``, in pixels of the output.

    Two channels a thread, 32 a block: beside the tile there has to be room for the next one's
    stored values, ``element_bytes`` each, and for a second block, which computes while the first
    waits. 256 threads at no more than 128 registers. Blocks walk over several units.
    """
    patch = (4, 4) if shape.k <= TUNED_KERNEL and shape.s == 1 else (2, 4)

    def shared(images: int, th: int, tw: int) -> int:
        staged = ((th - 1) * shape.s + shape.k) * ((tw - 1) * shape.s + shape.k)
        copied = staged
        if th >= shape.out[0] and tw >= shape.out[1]:  # the whole image: its padding stays
            copied = min(staged, shape.h * shape.w)
        taps = -(-(shape.k**2) * (CHANNELS + 2) // 4) * 4
        floats = images * staged * CHANNELS + taps + 3 * CHANNELS
        return 4 * floats + -(-images * copied * CHANNELS * element_bytes // 16) * 16

    tiling = _tiling(
        shape, shape.out, patch, limits, shared,
        most_threads=256 if shape.k <= TUNED_KERNEL else 128, resident_threads=512,
    )  # fmt: skip
    return _walking(tiling, shape, limits)


@cache
def backward_tiling(shape: Shape, limits: DeviceLimits, element_bytes: int) -> Tiling:
    """Tiling of ``depthwise_backward.cu``, in pixels of the input.

    Two channels a thread, 32 a block; 128 threads at no more than 168 registers, three blocks of
    them. Beside the tile of dy there has to be room for x, ``element_bytes`` a value. Blocks walk
    over several units, so that partial weight gradients are few.
    """
    patch = (2, 4)

    def shared(images: int, th: int, tw: int) -> int:
        staged = images * (th + shape.k - 1) * (tw + shape.k - 1)
        taps = -(-(shape.k**2) * (CHANNELS + 2) // 4) * 4
        x = -(-images * th * tw * CHANNELS * element_bytes // 16) * 16
        return 4 * (staged * CHANNELS + taps + 5 * CHANNELS) + x

    tiling = _tiling(
        shape, (shape.h, shape.w), patch, limits, shared,
        most_threads=128, resident_threads=384,
    )  # fmt: skip
    # where the thread groups' sums meet: all taps, or a row of them, and BN's two
    taps = shape.k**2 if shape.k <= TUNED_KERNEL else shape.k
    groups = tiling.threads * 2 // CHANNELS
    sums = 4 * groups * (taps + 2) * (CHANNELS + 2)
    return _walking(replace(tiling, shared=max(tiling.shared, sums)), shape, limits)


def _walking(tiling: Tiling, shape: Shape, limits: DeviceLimits) -> Tiling:
    """As many blocks as finish soonest: full waves of them, each walking over several units.

    A block's start (weights, the first copy that nothing hides, its partial sums) is reckoned as
    half a unit; of equals the fewest blocks, which leave the fewest partial sums.
    """
    down, across, units, _ = tiling.grid
    resident = min(
        tiling.min_blocks,
        max(1, limits.shared_per_multiprocessor // (tiling.shared + RESERVED_SHARED)),
    )
    slots = limits.multiprocessors * resident
    columns = channel_blocks(shape.c, CHANNELS)

    def duration(a_block: int) -> tuple[float, int]:
        return -(-columns * -(-units // a_block) // slots) * (a_block + 0.5), -a_block

    # more than this in one block would leave multiprocessors without any
    most = max(1, -(-units * columns // slots)) + 1
    best = min(range(1, min(most, units) + 1), key=duration)
    return replace(tiling, grid=(down, across, units, -(-units // best)))


def _tiles(extent: tuple[int, int], patch: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Tiles to try, larger first, cut to the image."""
    for th, tw in ((16, 16), (8, 16), (8, 8), (4, 8), (4, 4), (2, 4)):
        if th % patch[0] == 0 and tw % patch[1] == 0:
            yield (
                min(th, -(-extent[0] // patch[0]) * patch[0]),
                min(tw, -(-extent[1] // patch[1]) * patch[1]),
            )


def _tiling(
    shape: Shape,
    extent: tuple[int, int],
    patch: tuple[int, int],
    limits: DeviceLimits,
    shared: Callable[[int, int, int], int],
    *,
    most_threads: int,
    resident_threads: int,
) -> Tiling:
    """The largest tile of ``extent`` that leaves room for the blocks that should be resident.

    Args:
        shape: the convolution.
        extent: height and width that the tiles cover.
        patch: pixels a thread computes at a time.
        limits: of the device.
        shared: bytes of shared memory for (images, tile height, tile width).
        most_threads: threads of a block.
        resident_threads: threads a multiprocessor has registers for.
    """
    wanted = max(2, resident_threads // most_threads) if shape.k <= TUNED_KERNEL else 2
    for resident in (wanted, 1):
        budget = min(
            limits.shared_per_block,
            limits.shared_per_multiprocessor // resident - RESERVED_SHARED,
        )
        tiles = [tile for tile in _tiles(extent, patch) if shared(1, *tile) <= budget]
        if tiles:
            break
    else:
        raise ValueError(
            f"no tile of a {shape.k}x{shape.k} convolution fits {budget} bytes of shared memory"
        )
    tile = tiles[0]
    patches = tile[0] * tile[1] // (patch[0] * patch[1])
    lanes = CHANNELS // 2
    images = 1  # small images: several a block, for threads to have work
    while (
        images < shape.b and images * patches * lanes < 128 and shared(2 * images, *tile) <= budget
    ):
        images *= 2
    wanted_threads = min(most_threads, images * patches * lanes)
    threads = -(-wanted_threads // CHANNELS) * CHANNELS  # so that a thread's channels stay
    down, across = -(-extent[0] // tile[0]), -(-extent[1] // tile[1])
    units = -(-shape.b // images) * down * across
    return Tiling(
        CHANNELS, images, tile, patch, threads, max(1, resident_threads // threads),
        shared(images, *tile), (down, across, units, units),
    )  # fmt: skip
