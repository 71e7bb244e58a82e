"""Tilings fit the device and cover the tensor, whatever the shape."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvae.ops.cuda import DeviceLimits
from nvae.ops.tiling import (
    RESERVED_SHARED,
    Shape,
    Tiling,
    backward_tiling,
    channel_blocks,
    forward_tiling,
)

DEVICES = {
    "A100": DeviceLimits(80, 108, 166912, 167936),
    "L4": DeviceLimits(89, 58, 101376, 102400),
    "H100": DeviceLimits(90, 132, 232448, 233472),
    "B200": DeviceLimits(100, 148, 232448, 233472),
}
shapes = st.builds(
    Shape,
    b=st.integers(1, 300),
    c=st.integers(1, 6000),
    h=st.integers(1, 300),
    w=st.integers(1, 300),
    k=st.sampled_from([1, 3, 5, 7, 9, 11]),
    s=st.sampled_from([1, 2]),
)


@settings(deadline=None, max_examples=300)
@given(shapes, st.sampled_from(list(DEVICES.values())), st.sampled_from([2, 4]))
def test_tiling_fits_and_covers(shape: Shape, limits: DeviceLimits, bytes_: int) -> None:
    forward = forward_tiling(shape, limits, bytes_)
    backward = backward_tiling(shape, limits, bytes_)
    for tiling, extent in ((forward, shape.out), (backward, (shape.h, shape.w))):
        assert tiling.shared + RESERVED_SHARED <= limits.shared_per_multiprocessor
        assert tiling.shared <= limits.shared_per_block
        down, across, units, rows = tiling.grid
        assert down * tiling.tile[0] >= extent[0]
        assert across * tiling.tile[1] >= extent[1]
        assert units >= down * across * -(-shape.b // tiling.images)
        assert 1 <= rows <= units
        assert tiling.tile[0] % tiling.patch[0] == tiling.tile[1] % tiling.patch[1] == 0
        assert tiling.threads % (tiling.channels // 2) == 0
        assert tiling.threads % 32 == 0
        # every vector width divides the block's channels evenly over its threads
        assert tiling.threads % tiling.channels == 0
        assert channel_blocks(shape.c, tiling.channels) * tiling.channels >= shape.c
        # forward: the threads' sums reuse the tile
        assert tiling.shared >= 16 * tiling.threads or tiling is backward


@pytest.mark.parametrize(
    "shape",
    [
        Shape(32, 1536, 16, 16, 5, 1),
        Shape(16, 768, 32, 32, 5, 1),
        Shape(4, 360, 128, 128, 5, 1),
        Shape(200, 1536, 4, 4, 5, 1),
    ],
)
def test_main_shapes_leave_room_for_several_blocks(shape: Shape) -> None:
    """One block stages while another computes."""
    limits = DEVICES["H100"]

    def resident(tiling: Tiling) -> int:
        return limits.shared_per_multiprocessor // (tiling.shared + RESERVED_SHARED)

    assert resident(forward_tiling(shape, limits, 2)) >= 2
    assert resident(backward_tiling(shape, limits, 2)) >= 3
