"""An exported folder: weights, configuration, model card, samplers."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae.checkpoint import Weights, load_checkpoint, load_model, write_weights
from nvae.export.card import model_card
from nvae.export.sampler import (
    TOLERANCE,
    Sampler,
    compile_sampler,
    describe_sampler,
    export_sampler,
    largest_difference,
)
from nvae.files import write_json
from nvae.sampling.inductor import load_machine_code
from nvae.sampling.pixels import PixelTemperature, check_pixel_temperature

PROGRAM_FILE = "sampler.pt2"
COMPILED_FILE = "sampler_compiled.pt2"
PROGRAM_DESCRIPTION = "sampler.json"


def export(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Weights = "ema",
    pixel_temperature: PixelTemperature = "mean",
    with_sampler: bool = True,
    compiled_batch: int | None = None,
) -> float | None:
    """Write the folder as a whole or not at all.

    Args:
        checkpoint: anything that :func:`load_model` reads.
        folder: must not hold anything yet.
        weights: averaged or raw.
        pixel_temperature: of the sampler program: ``"mean"``, or the factor on the pixel noise.
        with_sampler: write the program.
        compiled_batch: also compile the sampler for this machine and this many images at a time.

    Returns:
        The largest difference of a pixel between programs and eager model; None without program.

    Raises:
        CheckpointError: the checkpoint is missing or bad.
        ValueError: the folder holds something, a program disagrees with the model, or there is no
            compiler.
        ModuleNotFoundError: safetensors is not installed.
        FloatingPointError: pictures are not made of finite numbers.
        OSError: the disk is full or the folder cannot be written to.
    """
    _refuse_used(folder)
    check_pixel_temperature(pixel_temperature)
    model = load_model(checkpoint, weights)
    said = load_checkpoint(checkpoint).get("run_config") if checkpoint.is_file() else None
    run_config = said if isinstance(said, dict) else None
    with _whole_folder(folder) as building:
        write_weights(model, building)
        (building / "README.md").write_text(model_card(model, run_config), encoding="utf-8")
        if not with_sampler:
            return None
        return _write_samplers(Sampler(model, pixel_temperature), building, compiled_batch)


def _write_samplers(sampler: Sampler, folder: Path, compiled_batch: int | None) -> float:
    program = export_sampler(sampler)
    worst = _checked_difference("exported", sampler, program.module())
    packed = io.BytesIO()  # torch's own writer does not survive a full disk
    torch.export.save(program, packed)
    (folder / PROGRAM_FILE).write_bytes(packed.getbuffer())
    description = {
        **describe_sampler(sampler),
        "torch": torch.__version__,
        "largest_difference_from_eager": worst,
    }
    if compiled_batch is not None:
        compiled = _write_compiled(sampler, folder, compiled_batch)
        description["compiled"] = compiled
        worst = max(worst, compiled["largest_difference_from_eager"])
    write_json(folder / PROGRAM_DESCRIPTION, description)
    return worst


def _write_compiled(sampler: Sampler, folder: Path, batch: int) -> dict[str, Any]:
    path = folder / COMPILED_FILE
    path.write_bytes(compile_sampler(sampler, batch))
    difference = _checked_difference("compiled", sampler, load_machine_code(path), (batch,))
    return {
        "batch": batch,
        "processor": f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "largest_difference_from_eager": difference,
    }


def _checked_difference(
    kind: str, sampler: Sampler, run: Callable[..., Tensor], batches: Sequence[int] = (1, 3)
) -> float:
    difference = largest_difference(sampler, run, batches)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the {kind} sampler differs from the model by {difference:.1e} in a pixel, more "
            f"than {TOLERANCE:.0e}; nothing was written"
        )
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
