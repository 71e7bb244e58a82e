"""`compress.py`: pictures, or a data set's split, to one archive."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nvae.cli.checkpoint_data import (
    check_split,
    choose_data,
    open_checkpoint,
    open_data,
    split_off_data,
    with_data,
)
from nvae.cli.common import keep_freed_memory, progress_bar
from nvae.cli.errors import run_command
from nvae.cli.schema import build
from nvae.codec.chain import BlockSize
from nvae.codec.codec import Codec
from nvae.codec.container import ImageFile
from nvae.codec.images import Wanted, black_border, check_names, read_image
from nvae.codec.pixels import window
from nvae.codec.walk import PassSettings
from nvae.data.dataset import ImageData
from nvae.data.readers.pictures import is_picture
from nvae.files import replacing
from nvae.settings import Bounds, check_choice, check_fields

_BOUNDS: dict[str, Bounds] = {"block_images": (1, 1 << 28)}
_NEW = "give another output or overwrite=true"


@dataclass
class CompressConfig:
    """What to compress, and how.

    `configs/compress.yaml` says what each setting means.
    """

    checkpoint: str
    output: str
    input: str | None = None
    split: str | None = None
    plugins: list[str] = field(default_factory=list)
    settings: str | None = None
    weights: str = "ema"
    batch_size: int = 16
    threads: int = 1
    precision: str = "float32"
    block_images: int | None = None
    verify: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "", **_BOUNDS)
        check_choice("weights", self.weights, ("ema", "raw"))
        _ = PassSettings(self.batch_size, self.threads, self.precision)
        if (self.input is None) == (self.split is None):
            raise ValueError("give one of input=FOLDER and split=train|valid|test")
        if self.split is not None:
            check_split(self.split)


SCHEMA = with_data(CompressConfig)

Block = tuple[Tensor, list[ImageFile]]


def main() -> None:
    """The command."""
    run_command("compress", _run, SCHEMA)


def _run(composed: DictConfig) -> None:
    own, given = split_off_data(composed)
    _compress(build(CompressConfig, own), given)


def _compress(config: CompressConfig, given: dict[str, Any]) -> None:
    keep_freed_memory()
    output = Path(config.output)
    _check_output(output, overwrite=config.overwrite)
    opened = open_checkpoint(config.checkpoint, config.weights, config.plugins, config.settings)
    codec = Codec(
        opened.model, batch_size=config.batch_size, threads=config.threads,
        precision=config.precision, block_images=config.block_images, checkpoint=opened.file.name,
    )  # fmt: skip
    source: _Split | _Pictures
    if config.split is None:
        assert config.input is not None
        source = _Pictures(Path(config.input), codec)
    else:
        data = open_data(choose_data(given, opened.run_config), opened.model.config)
        source = _Split(data, config.split, codec, window(opened.model.config))
    started = monotonic()
    with replacing(output) as temporary:
        with (
            temporary.open("wb") as file,
            progress_bar("images", len(source)) as advance,
        ):
            sizes = list(
                codec.write(
                    file, len(source), source.blocks(), verify=config.verify, progress=advance
                )
            )
        written = temporary.stat().st_size
        _check_output(output, overwrite=config.overwrite)  # hours later
    channels, side, _ = codec.image_shape
    print(_summary(sizes, written, channels * side * side, monotonic() - started))
    print(f"written to {output}")


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.is_dir():
        raise ValueError(f"output={output} is a folder; give the archive a name in it")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already; {_NEW}")


def _summary(sizes: list[BlockSize], written: int, pixels: int, seconds: float) -> str:
    images = sum(size.images for size in sizes)
    chained = images - sum(size.starters for size in sizes)
    lines = [
        f"{images} images, {written:,} bytes, {8 * written / (images * pixels):.4f} bits/dim, "
        f"{images / seconds:.1f} images/s"
    ]
    if chained:
        net = sum(size.chain_bits for size in sizes) / (chained * pixels)
        lines.append(f"net {net:.4f} bits/dim: what the model coded, {chained} of the images")
    return "\n".join(lines)


class _Pictures:
    """The pictures of a folder; all are read once before anything is written."""

    def __init__(self, place: Path, codec: Codec) -> None:
        self._codec = codec
        channels, side, _ = codec.image_shape
        self._wanted = Wanted(channels, side, codec.bits)
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.is_file())
            pictures = [path for path in files if is_picture(path.name)]
            if not pictures:
                raise ValueError(f"there are no pictures in {place}")
            if len(pictures) < len(files):
                print(f"note: {len(files) - len(pictures)} files are no pictures and are left out")
            self._files = [(path, path.relative_to(place).as_posix()) for path in pictures]
        elif place.exists():
            self._files = [(place, place.name)]
        else:
            raise ValueError(f"input={place} is not there")
        check_names(name for _, name in self._files)
        for path, name in self._files:
            read_image(path, name, self._wanted)

    def __len__(self) -> int:
        return len(self._files)

    def blocks(self) -> Iterator[Block]:
        """As :meth:`Codec.write` takes them."""
        size = self._codec.block_images
        for start in range(0, len(self._files), size):
            read = [read_image(*file, self._wanted) for file in self._files[start : start + size]]
            yield torch.stack([levels for levels, _ in read]), [file for _, file in read]


class _Split:
    """The images of a data set's split, without names."""

    def __init__(
        self, data: ImageData, split: str, codec: Codec, inside: tuple[slice, slice]
    ) -> None:
        self._data, self._split, self._codec, self._inside = data, split, codec, inside

    def __len__(self) -> int:
        return len(self._data.split(self._split))

    def blocks(self) -> Iterator[Block]:
        """As :meth:`Codec.write` takes them."""
        size, white = self._codec.block_images, 2**self._codec.bits - 1
        waiting: list[Tensor] = []
        for batch in self._data.batches(self._split):
            if not black_border(batch.x, self._inside):
                raise ValueError(
                    f"images of split={self._split} are not black outside the window that the "
                    "likelihood counts, and that would be lost"
                )
            levels = (batch.x[..., *self._inside] * white).round().to(torch.uint8)
            waiting.append(levels)
            while sum(map(len, waiting)) >= size:
                together = torch.cat(waiting)
                yield together[:size].contiguous(), []
                waiting = [together[size:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting).contiguous(), []
