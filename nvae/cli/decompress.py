"""`decompress.py`: an archive's images as files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nvae.cli.checkpoint_data import open_checkpoint
from nvae.cli.common import keep_freed_memory, progress_bar
from nvae.cli.errors import run_command
from nvae.cli.sample_config import integers
from nvae.cli.schema import build, schema_of
from nvae.codec.chain import DamagedBlockError
from nvae.codec.codec import Codec
from nvae.codec.container import Archive, ImageFile
from nvae.codec.images import check_names, to_picture, write_image
from nvae.settings import check_choice, check_fields


@dataclass
class DecompressConfig:
    """What to restore, and where.

    `configs/decompress.yaml` says what each setting means.
    """

    checkpoint: str
    input: str
    output: str
    plugins: list[str] = field(default_factory=list)
    settings: str | None = None
    weights: str = "ema"
    images: Any = None
    try_anyway: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "")
        check_choice("weights", self.weights, ("ema", "raw"))
        _ = self.numbers

    @property
    def numbers(self) -> frozenset[int] | None:
        """Of the images wanted; None: all."""
        return None if self.images is None else frozenset(integers("images", self.images))


SCHEMA = schema_of(DecompressConfig)


def main() -> None:
    """The command."""
    run_command("decompress", _run, SCHEMA)


def _run(composed: DictConfig) -> None:
    _decompress(build(DecompressConfig, composed))


def _decompress(config: DecompressConfig) -> None:
    keep_freed_memory()
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={folder} is no folder")
    if not Path(config.input).exists():
        raise ValueError(f"input={config.input} is not there")
    with Archive.open(config.input) as archive:
        wanted = config.numbers
        if wanted is not None and max(wanted) >= len(archive):
            raise ValueError(f"images={config.images}: the archive has {len(archive)} images")
        opened = open_checkpoint(config.checkpoint, config.weights, config.plugins, config.settings)
        codec = Codec(opened.model)
        walk = codec.walk_for(archive, try_anyway=config.try_anyway)
        faults = list(archive.lost)
        written = 0
        with progress_bar("images", len(archive)) as advance:

            def is_wanted(numbers: range) -> bool:
                return wanted is None or not wanted.isdisjoint(numbers)

            for place, files, found in codec.read(archive, walk, is_wanted, advance):
                if isinstance(found, DamagedBlockError):
                    faults.append(
                        f"block {place.number} (images from {place.first_image}): {found}"
                    )
                    continue
                numbers = range(place.first_image, place.first_image + len(found))
                named = files or [
                    _unnamed(number, found.shape[1], codec.bits) for number in numbers
                ]
                for name, number, levels, file in zip(
                    check_names(named), numbers, found, named, strict=True
                ):
                    if wanted is None or number in wanted:
                        picture = to_picture(levels, file, codec.bits)
                        write_image(folder / name, picture, overwrite=config.overwrite)
                        written += 1
    print(f"{written} images written to {folder}")
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise ValueError(
            f"{config.input} is damaged, the other images are restored: {faults[0]}{more}"
        )


def _unnamed(number: int, channels: int, bits: int) -> ImageFile:
    """Of an image that came from no file: a picture where that can be, else an array."""
    name = f"{number:06d}"
    if bits > 8:
        return ImageFile(name, "I;16" if channels == 1 else "uint16 HWC", "low")
    if channels not in (1, 3):
        return ImageFile(name, "uint8 HWC", "low")
    return ImageFile(name, "RGB" if channels == 3 else "L", "full")
