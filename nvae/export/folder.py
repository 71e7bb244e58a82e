"""An exported folder: weights, configuration, model card, samplers."""

import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae.checkpoint import CONFIG_FILE, Weights, load_checkpoint, load_model, write_weights
from nvae.command_line import brief
from nvae.export.sampler import (
    TOLERANCE,
    Sampler,
    compile_sampler,
    describe_sampler,
    export_sampler,
    largest_difference,
)
from nvae.files import write_json
from nvae.models import MODELS, HierarchicalVAE, plugins_of
from nvae.sampling.compiled import load_machine_code
from nvae.sampling.prior import PixelTemperature, check_pixel_temperature
from nvae.settings import height_width

PROGRAM_FILE = "sampler.pt2"
COMPILED_FILE = "sampler_compiled.pt2"
PROGRAM_DESCRIPTION = "sampler.json"


def export(
    checkpoint: Path,
    folder: Path,
    *,
    weights: Weights = "ema",
    plugins: Iterable[str] = (),
    settings: str | None = None,
    pixel_temperature: PixelTemperature = "mean",
    with_sampler: bool = True,
    compiled_batch: int | None = None,
) -> float | None:
    """Write the folder as a whole or not at all.

    Args:
        checkpoint: anything that :func:`load_model` reads.
        folder: must not hold anything yet.
        weights: averaged or raw.
        plugins: classes that are not ours and that the file may name; as for :func:`load_model`.
        settings: of a published file that does not hold them; ``config`` of :func:`load_model`.
        pixel_temperature: what the sampler gives: ``"mean"``, or a draw with this factor on the
            pixel noise.
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
        OSError: the disk is full or the folder cannot be written to; the message names it. Or the
            checkpoint cannot be read.
    """
    _refuse_used(folder)
    check_pixel_temperature(pixel_temperature)
    model = load_model(checkpoint, weights, plugins, config=settings)
    run_config = None
    if checkpoint.is_file():  # an exported folder says nothing of its training
        run_config = load_checkpoint(checkpoint, ["run_config"]).get("run_config")
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
    """A folder whose files are those of ``folder`` if the block succeeds.

    It takes the place of ``folder``. One that is there stays, since it may be the current folder or
    where a disk is mounted; the files are moved into it.

    Raises:
        OSError: one of the folders cannot be written to.
    """
    folder = folder.resolve()
    is_there = folder.exists()
    building = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder if is_there else folder.parent
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=place))
        yield building
        if is_there:
            _move_up(building)
        else:
            building.chmod(0o755)
            os.replace(building, folder)  # refuses a folder that has been filled meanwhile
    except BaseException as error:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{folder} cannot be written: {error}") from error
        raise


def _move_up(building: Path) -> None:
    """Move all files to the folder around, which holds nothing else, and the configuration last:
    without it the others are no model."""
    folder = building.parent
    if list(folder.iterdir()) != [building]:
        raise FileExistsError("it has been filled meanwhile")
    files = sorted(building.iterdir(), key=lambda file: file.name == CONFIG_FILE)
    try:
        for file in files:
            file.rename(folder / file.name)
    except BaseException:
        for file in files:
            (folder / file.name).unlink(missing_ok=True)
        raise
    building.rmdir()


def model_card(model: HierarchicalVAE, run_config: dict[str, Any] | None = None) -> str:
    """What the weights are, what they were trained on and how to use them, as Markdown.

    Args:
        model: with its weights.
        run_config: of the run that trained it, where that is known; it may be anybody's.
    """
    ours = (_FAMILIES[name] for name in _FAMILIES if isinstance(model, MODELS[name]))
    family, paper = next(ours, (type(model).__name__, ""))
    plugins = plugins_of(model)
    parts = [
        _FRONT_MATTER,
        f"# Deep hierarchical VAE ({family})\n",
        f"A deep hierarchical variational autoencoder{f' after {paper}' if paper else ''}, trained "
        "with the `nvae` package.\n",
        _table(_network_facts(model)),
        "`config.json` has every setting of the network.\n",
        "## Training\n",
        _table(facts)
        if (facts := _training_facts(run_config or {}))
        else "The checkpoint does not say what it was trained on.\n",
        _USE.replace("HUB", _HUB if family == "NVAE" else "").replace(
            '"FOLDER"', f'"FOLDER", plugins={plugins}' if plugins else '"FOLDER"'
        ),
    ]
    return "\n".join(parts)


def _network_facts(model: HierarchicalVAE) -> dict[str, str]:
    config = model.config
    color = {1: "gray", 3: "color"}.get(config.image_channels, f"{config.image_channels}-channel")
    height, width = height_width(config.image_size)
    widths = dict.fromkeys(shape[0] for shape in reversed(model.latent_shapes))
    return {
        "images": f"{height} x {width}, {color}, {config.bits} bits",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "latent groups, fine to coarse": ", ".join(map(str, model.groups_per_scale[::-1])),
        "latent channels of a group": ", ".join(map(str, widths)),
        "likelihood": config.pixel_distribution.title,
    }


def _training_facts(run: dict[str, Any]) -> dict[str, str]:
    data, trainer = (
        value if isinstance(value := run.get(name), dict) else {} for name in ("data", "trainer")
    )
    facts = {
        "run": run.get("name"),
        "data set": data.get("name"),
        "its license": data.get("license", data.get("licence")),
        "its source": data.get("citation") or data.get("homepage"),
        "training images": data.get("train_size"),
        "epochs": trainer.get("max_epochs", trainer.get("epochs")),
        "batch": data.get("global_batch") or data.get("batch_size"),
        "seed": run.get("seed"),
    }
    return {name: _cell(value) for name, value in facts.items() if value not in (None, "")}


def _cell(value: Any) -> str:
    """Text of a configuration, which may be anybody's: no markup, and it must not end the table."""
    return re.sub(r"([\\`*_\[\]!|])", r"\\\1", brief(value, 300)).replace("<", "&lt;")


def _table(facts: dict[str, str]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


_FRONT_MATTER = """---
library_name: nvae
pipeline_tag: unconditional-image-generation
tags:
- nvae
- variational-autoencoder
---
"""

_FAMILIES = {
    "nvae": ("NVAE", "[Vahdat & Kautz, NeurIPS 2020](https://arxiv.org/abs/2007.03898)"),
    "vdvae": ("VDVAE", "[Child, ICLR 2021](https://arxiv.org/abs/2011.10650)"),
    "evdvae": ("Efficient-VDVAE", "[Hazami et al. 2022](https://arxiv.org/abs/2203.13751)"),
}
"""Name and paper of the package's models."""

_HUB = "`nvae.hub.HubNVAE.from_pretrained` reads it too. "

_USE = """## Use

```python
from nvae.checkpoint import load_model

model = load_model("FOLDER")  # this folder
images = model.sample(16, temperature=0.7)  # (16, C, H, W) in [0, 1]
```

HUB`sampler.pt2`, where present, needs torch alone;
`sampler.json` says what it takes.
"""
