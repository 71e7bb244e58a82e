"""`python -m nvae.export CHECKPOINT --to DIR`: weights, configuration, model card, sampler."""

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nvae.atomic import replacing, write_json
from nvae.checkpoint import Weights, load_checkpoint, load_model
from nvae.export.card import model_card
from nvae.export.sampler import (
    TOLERANCE,
    Sampler,
    describe_sampler,
    export_sampler,
    largest_difference,
)
from nvae.export.weights import write_weights
from nvae.models import NVAE
from nvae.sampling.pixels import PixelTemperature, check_pixel_temperature

PROGRAM_FILE = "sampler.pt2"
PROGRAM_DESCRIPTION = "sampler.json"


def export(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Weights = "ema",
    pixel_temperature: PixelTemperature = "mean",
    with_sampler: bool = True,
) -> float | None:
    """Write the folder as a whole or not at all.

    Args:
        checkpoint: anything that :func:`load_model` reads.
        folder: must not hold anything yet.
        weights: averaged or raw.
        pixel_temperature: of the sampler program: ``"mean"``, or the factor on the pixel noise.
        with_sampler: write the program.

    Returns:
        The largest difference of a pixel between program and eager model; None without program.

    Raises:
        CheckpointError: the checkpoint is missing or bad.
        ValueError: the folder holds something, or the program disagrees with the model.
        ModuleNotFoundError: safetensors is not installed.
        OSError: the disk is full or the folder cannot be written to.
    """
    _refuse_used(folder)
    check_pixel_temperature(pixel_temperature)
    model = load_model(checkpoint, weights)
    run_config = load_checkpoint(checkpoint).get("run_config") if checkpoint.is_file() else None
    with _whole_folder(folder) as building:
        write_weights(model, building)
        (building / "README.md").write_text(model_card(model, run_config), encoding="utf-8")
        return _write_sampler(model, building, pixel_temperature) if with_sampler else None


def _write_sampler(model: NVAE, folder: Path, pixel_temperature: PixelTemperature) -> float:
    sampler = Sampler(model, pixel_temperature)
    program = export_sampler(sampler)
    difference = largest_difference(sampler, program)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the exported sampler differs from the model by {difference:.1e} in a pixel, more "
            f"than {TOLERANCE:.0e}; nothing was written"
        )
    packed = io.BytesIO()  # torch's own writer does not survive a full disk
    torch.export.save(program, packed)
    with replacing(folder / PROGRAM_FILE) as temporary:
        temporary.write_bytes(packed.getbuffer())
    description = {
        **describe_sampler(sampler),
        "torch": torch.__version__,
        "largest_difference_from_eager": difference,
    }
    write_json(folder / PROGRAM_DESCRIPTION, description)
    return difference


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --to takes a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give --to a new folder")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place if the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield building
        building.chmod(0o755)
        os.replace(building, folder)  # refuses a folder that has been filled meanwhile
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _pixel_temperature(text: str) -> PixelTemperature:
    try:
        value: PixelTemperature = "mean" if text == "mean" else float(text)
        check_pixel_temperature(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: mean, or a number >= 0") from None
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nvae.export",
        description="Write a checkpoint's weights as safetensors with a JSON configuration and a "
        "model card, and the sampler as a torch.export program.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file to export")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a folder, new or empty"
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema",
        help="averaged weights where there are any, or the raw ones (default: ema)",
    )  # fmt: skip
    parser.add_argument(
        "--pixel-temperature", type=_pixel_temperature, default="mean", metavar="mean|T",
        help="what the sampler gives: the likelihood's mean, or a draw with this factor on the "
        "pixel noise, which it then takes as an input (default: mean)",
    )  # fmt: skip
    parser.add_argument(
        "--no-sampler", action="store_true", help="leave the program out: weights and card only"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Export; bad input is one line and exit code 2."""
    given = _parser().parse_args(arguments)
    try:
        difference = export(
            given.checkpoint,
            given.to,
            weights=given.weights,
            pixel_temperature=given.pixel_temperature,
            with_sampler=not given.no_sampler,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        text = (
            f"{given.to} cannot be written: {error}" if isinstance(error, OSError) else str(error)
        )
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"written: {', '.join(sorted(file.name for file in given.to.iterdir()))} in {given.to}")
    if difference is not None:
        print(f"the program agrees with the model to {difference:.0e} a pixel")


if __name__ == "__main__":
    main()
