"""Moving pictures on disk: GIF by Pillow, MP4 by PyAV."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.files import replacing
from nvae.images import enlarge, to_uint8

FORMATS = ("gif", "mp4")


def check_format(name: str) -> None:
    """Raise a ValueError unless animations of this format can be written here."""
    if name not in FORMATS:
        raise ValueError(f"animation={name!r} is unknown; allowed: {', '.join(FORMATS)}")
    if name == "mp4" and find_spec("av") is None:
        raise ValueError("animation=mp4 needs PyAV: pip install 'nvae[video]', or animation=gif")


def save_animation(path: str | Path, frames: Tensor, *, milliseconds: int = 80) -> None:
    """Play ``frames`` ``(N, C, H, W)`` in [0, 1] there and back; small ones are enlarged.

    A GIF plays for ever; an MP4 (H.264) loses a little at sharp edges.

    Args:
        path: ends in ``.gif`` or ``.mp4``; replaced atomically.
        frames: in order.
        milliseconds: for each.

    Raises:
        ValueError: no frames, or a format that cannot be written here.
    """
    path = Path(path)
    check_format(path.suffix[1:])
    if not len(frames):
        raise ValueError("no frames for an animation")
    pictures = [enlarge(frame) for frame in to_uint8(frames)]
    pictures += pictures[-2:0:-1]
    encoded = (
        _gif(pictures, milliseconds) if path.suffix == ".gif" else _mp4(pictures, milliseconds)
    )
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def _gif(pictures: Sequence[NDArray[np.uint8]], milliseconds: int) -> bytes:
    first, *others = [Image.fromarray(p.squeeze(2) if p.shape[2] == 1 else p) for p in pictures]
    file = io.BytesIO()
    first.save(
        file, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0
    )
    return file.getvalue()


def _mp4(pictures: Sequence[NDArray[np.uint8]], milliseconds: int) -> bytes:
    from fractions import Fraction

    import av

    height, width = pictures[0].shape[:2]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1000, milliseconds))
        # colour is stored at half the resolution, which needs even sides
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for picture in pictures:
            rgb = np.broadcast_to(picture, (height, width, 3))
            even = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            for packet in stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
