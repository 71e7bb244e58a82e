"""What a VDVAE is: block strings and widths as its authors write them, checked at once."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from nvae.models.logistic_mixture import log_scale_floor
from nvae.models.stable_mixture import LogisticForm
from nvae.models.very_deep import MOST_LAYERS, VeryDeepConfig, resolution_of
from nvae.settings import Bounds, height_width, show_size


class Block(NamedTuple):
    """One item of a block string.

    Attributes:
        resolution: shorter side of its input.
        factor: of pooling, in the encoder; resolution of what is mixed in, in the decoder; None:
            none.
    """

    resolution: int
    factor: int | None


@dataclass(frozen=True)
class VDVAEConfig(VeryDeepConfig):
    """Architecture and likelihood of a :class:`~nvae.models.vdvae.VDVAE`.

    A block string is a list with commas: ``32x11`` are eleven blocks at 32x32; ``32d2``, in the
    encoder, one block at 32x32 that ends in pooling by 2; ``16m8``, in the decoder, one block at
    16x16 that the state of 8x8 is added to; ``32`` is one block. A resolution is named by its
    shorter side: of images of 96x64, the blocks of ``64x2,64d2,32x4`` are at 96x64 and 48x32.

    Attributes:
        encoder_blocks: from the image to the coarsest resolution.
        decoder_blocks: from the coarsest resolution to the image.
        width: channels of every resolution that `custom_widths` does not name.
        custom_widths: ``R:W,R:W``: W channels at resolution R.
        latent_channels: channels of each block's z.
        bottleneck_multiple: channels inside a block, as a share of its width.
        no_bias_above: resolutions up to this one start from a learned state, the others from 0.
        pixel_mean: the network's input is (v - pixel_mean) / pixel_std, v from 0 to 255.
        pixel_std: see there.

    Raises:
        ValueError: one line that says what cannot work and what could.
    """

    image_channels: int = 3
    encoder_blocks: str = "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3"
    decoder_blocks: str = "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21"
    width: int = 512
    custom_widths: str = ""
    latent_channels: int = 16
    bottleneck_multiple: float = 0.25
    no_bias_above: int = 64
    pixel_mean: float = 127.5
    pixel_std: float = 127.5

    def __post_init__(self) -> None:
        super().__post_init__()
        encoder = parse_blocks(self.encoder_blocks, "encoder_blocks", "d")
        decoder = parse_blocks(self.decoder_blocks, "decoder_blocks", "m")
        sizes = self._check_encoder(encoder)
        self._check_widths(sizes)
        self._check_decoder(decoder, sizes)

    @classmethod
    def bounds(cls) -> dict[str, Bounds]:
        """Least and greatest value of the numbers."""
        return super().bounds() | {
            "width": (1, 65536), "latent_channels": (1, 1024), "bottleneck_multiple": (0, 16),
            "no_bias_above": (0, 4096), "pixel_mean": (-1e4, 1e4), "pixel_std": (1e-6, 1e6),
        }  # fmt: skip

    @property
    def logistics(self) -> LogisticForm:
        """Exponential scales with the floor of PixelCNN++."""
        return LogisticForm(
            min_log_scale=log_scale_floor(self.bits),
            published=not self.normalized,
            has_white_edge=False,
        )

    @property
    def encoder_plan(self) -> list[Block]:
        """The encoder's blocks."""
        return parse_blocks(self.encoder_blocks, "encoder_blocks", "d")

    @property
    def decoder_plan(self) -> list[Block]:
        """The decoder's blocks, one a latent group."""
        return parse_blocks(self.decoder_blocks, "decoder_blocks", "m")

    def width_at(self, resolution: int) -> int:
        """Channels of a resolution."""
        return _parse_widths(self.custom_widths).get(resolution, self.width)

    def middle_at(self, resolution: int) -> int:
        """Channels inside the blocks of a resolution."""
        return int(self.width_at(resolution) * self.bottleneck_multiple)

    @property
    def resolution(self) -> int:
        """The image's."""
        return resolution_of(self.image_shape)

    def size_at(self, resolution: int) -> tuple[int, int]:
        """Height and width of a resolution."""
        height, width = height_width(self.image_size)
        return height * resolution // self.resolution, width * resolution // self.resolution

    @property
    def learned_states(self) -> list[int]:
        """Resolutions that start from a learned state, ascending."""
        used = {block.resolution for block in self.decoder_plan}
        return sorted(r for r in used if r <= self.no_bias_above)

    def _check_encoder(self, blocks: list[Block]) -> list[int]:
        """The resolutions on the way down, the image's first."""
        sizes = [self.resolution]
        for block in blocks:
            size, factor = block.resolution, block.factor or 1
            if size != sizes[-1]:
                raise ValueError(
                    f"model.encoder_blocks has a block at {size}, but its input is {sizes[-1]} "
                    f"wide there; it starts at image_size={show_size(self.image_size)} and RdS "
                    "divides by S"
                )
            if size % factor:
                raise ValueError(f"model.encoder_blocks: {size}d{factor} does not divide {size}")
            if factor > 1:
                sizes.append(size // factor)
        pooled = sizes[0] // sizes[-1]
        self.check_divides(pooled, f"cannot be pooled by {pooled}, as model.encoder_blocks does")
        return sizes

    def _check_widths(self, sizes: list[int]) -> None:
        for resolution in _parse_widths(self.custom_widths):
            if resolution not in sizes:
                raise ValueError(
                    f"model.custom_widths names resolution {resolution}, which the encoder does "
                    f"not have; it has {', '.join(map(str, sizes))}"
                )
        if self.width_at(self.resolution) != self.width:
            raise ValueError(
                f"model.custom_widths gives {self.width_at(self.resolution)} channels at the "
                f"image's resolution, {self.resolution}; there it must be model.width={self.width}"
            )
        for finer, coarser in pairwise(sizes):
            if self.width_at(coarser) < self.width_at(finer):
                raise ValueError(
                    f"model.custom_widths: {self.width_at(coarser)} channels at {coarser} are "
                    f"fewer than the {self.width_at(finer)} at {finer}; they must not fall"
                )
        for size in sizes:
            if self.middle_at(size) < 1:
                raise ValueError(
                    f"model.bottleneck_multiple={self.bottleneck_multiple} leaves no channel of "
                    f"the {self.width_at(size)} at {size}"
                )

    def _check_decoder(self, blocks: list[Block], sizes: list[int]) -> None:
        known = set(self.learned_states)
        for size, source in blocks:
            if size not in sizes:
                raise ValueError(
                    f"model.decoder_blocks has a block at {size}, which the encoder does not "
                    f"have; it has {', '.join(map(str, sizes))}"
                )
            if source is not None:
                if source not in known:
                    raise ValueError(
                        f"model.decoder_blocks: {size}m{source} mixes in {source}, which no block "
                        "before it has made"
                    )
                if size % source:
                    raise ValueError(
                        f"model.decoder_blocks: {size}m{source}: {source} does not divide {size}"
                    )
                if self.width_at(source) < self.width_at(size):
                    raise ValueError(
                        f"model.decoder_blocks: {size}m{source} adds {self.width_at(source)} "
                        f"channels to {self.width_at(size)}; it takes as many or more"
                    )
            known.add(size)
        if self.resolution not in {block.resolution for block in blocks}:
            raise ValueError(
                f"model.decoder_blocks has no block at the image's resolution, {self.resolution}"
            )


def parse_blocks(text: str, setting: str, letter: str) -> list[Block]:
    """The blocks of a string; ``letter`` is the one of ``d`` and ``m`` that may stand in it.

    Raises:
        ValueError: one line that names the item.
    """
    blocks: list[Block] = []
    for item in text.split(","):
        sign = next((sign for sign in "xmd" if sign in item), None)
        if sign is not None and sign not in ("x", letter):
            meaning = {"d": "pools, which only an encoder does", "m": "mixes, as a decoder does"}
            raise ValueError(f"model.{setting}: {item.strip()!r} {meaning[sign]}")
        parts = [_whole(part) for part in item.split(sign)] if sign else [_whole(item)]
        least = 0 if sign == "x" else 1
        if len(parts) > 2 or parts[0] is None or parts[0] < 1 or parts[-1] is None:
            raise ValueError(_no_block(setting, item, letter))
        if parts[-1] < least:
            raise ValueError(_no_block(setting, item, letter))
        count = parts[1] if sign == "x" else 1
        factor = None if sign in ("x", None) else parts[1]
        assert count is not None
        if len(blocks) + count > MOST_LAYERS:
            raise ValueError(f"model.{setting} has more than {MOST_LAYERS} blocks")
        blocks += [Block(parts[0], factor)] * count
    return blocks


def _no_block(setting: str, item: str, letter: str) -> str:
    return (
        f"model.{setting}: {item.strip()!r} is no block; blocks are 32x11, 32 and "
        f"{'32d2' if letter == 'd' else '32m16'}, with commas between them"
    )


def _whole(text: str) -> int | None:
    """A whole number below a million, or None."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else None


def _parse_widths(text: str) -> dict[int, int]:
    widths = {}
    for item in text.split(",") if text.strip() else []:
        parts = [_whole(part) for part in item.split(":")]
        if len(parts) != 2 or not parts[0] or not parts[1] or parts[0] in widths:
            raise ValueError(
                f"model.custom_widths: {item.strip()!r} is no width; widths are 512:32,256:64, "
                "each resolution once"
            )
        widths[parts[0]] = parts[1]
    return widths
