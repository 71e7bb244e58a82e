"""`compress.py`: files of images, or a data set's split, to one archive."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from nvae.codec.chain import LARGEST_BLOCK, BlockSize
from nvae.codec.codec import Codec
from nvae.codec.container import ImageFile
from nvae.codec.images import Wanted, check_names, is_image_file, read_image
from nvae.codec.pixels import levels_of
from nvae.codec.walk import PassSettings
from nvae.data.dataset import ImageData
from nvae.files import replacing
from nvae.models import ImageConfig
from nvae.models.very_deep import VeryDeepConfig
from nvae.settings import Bounds, check_choice, check_fields

_BOUNDS: dict[str, Bounds] = {"block_images": (1, LARGEST_BLOCK)}
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
    source: _Split | _Files
    if config.split is None:
        assert config.input is not None
        source = _Files(Path(config.input), codec)
    else:
        model = opened.model.config
        if isinstance(model, VeryDeepConfig):  # the codec's masses sum to 1 in either form
            model = replace(model, normalized=True)
        data = open_data(choose_data(given, opened.run_config), model)
        source = _Split(data, config.split, codec, model)
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
    print(_summary(sizes, written, math.prod(codec.image_shape), monotonic() - started))
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


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below a folder, sorted, and the links to folders, which are not followed.

    Raises:
        ValueError: A folder cannot be read; an archive without its images would be no copy.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror or error}") from error

    files: list[Path] = []
    links: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        files += (path for name in names if (path := Path(place, name)).is_file())
        links += (path for name in folders if (path := Path(place, name)).is_symlink())
    return sorted(files), sorted(links)


class _Files:
    """The pictures and arrays of a folder; all are read once before anything is written."""

    def __init__(self, place: Path, codec: Codec) -> None:
        self._codec = codec
        self._wanted = Wanted(*codec.image_shape, codec.bits)
        if place.is_dir():
            files, links = _files_below(place)
            images = [path for path in files if is_image_file(path.name)]
            if links:
                print(f"note: links to folders are not followed: {', '.join(map(str, links))}")
            if not images:
                raise ValueError(f"there are no images in {place}")
            if len(images) < len(files):
                print(f"note: {len(files) - len(images)} files are no images and are left out")
            self._files = [(path, path.relative_to(place).as_posix()) for path in images]
        elif place.exists():
            self._files = [(place, place.name)]
        else:
            raise ValueError(f"input={place} is not there")
        check_names(read_image(path, name, self._wanted)[1] for path, name in self._files)

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

    def __init__(self, data: ImageData, split: str, codec: Codec, model: ImageConfig) -> None:
        self._data, self._split, self._codec, self._model = data, split, codec, model

    def __len__(self) -> int:
        return len(self._data.split(self._split))

    def blocks(self) -> Iterator[Block]:
        """As :meth:`Codec.write` takes them."""
        size = self._codec.block_images
        waiting: list[Tensor] = []
        for batch in self._data.batches(self._split):
            try:
                waiting.append(levels_of(self._model, batch.x))
            except ValueError as error:
                raise ValueError(f"images of split={self._split}: {error}") from None
            while sum(map(len, waiting)) >= size:
                together = torch.cat(waiting)
                yield together[:size].contiguous(), []
                waiting = [together[size:]]
        if sum(map(len, waiting)):
            yield torch.cat(waiting).contiguous(), []
