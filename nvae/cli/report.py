"""What a finished run says about itself: sample and reconstruction grids, test likelihood."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from nvae.checkpoint import CheckpointError, load_model
from nvae.cli.common import float32_products, open_device, precision_name
from nvae.command_line import brief, shell
from nvae.data import DataConfig
from nvae.data.config import IN_MEMORY_FORMATS, is_known, load_config
from nvae.data.dataset import ImageData
from nvae.evaluation import EvaluationResult, evaluate
from nvae.files import write_json
from nvae.models import HierarchicalVAE
from nvae.pictures import save_grids_side_by_side, save_rows
from nvae.sampling import decode, encode, sample_images
from nvae.settings import check_fields
from nvae.training.checkpointing import BEST, newest_checkpoint
from nvae.training.run_folder import RunFolder


@dataclass
class ReportConfig:
    """The report at the end of training.

    Attributes:
        importance_samples: draws of the importance-weighted bound; 0: no evaluation.
        temperatures: of the latents, one sample grid each.
        samples: pictures in each grid.
        chunk: images, or rows of the evaluation, in one pass; bounds the memory.
    """

    importance_samples: int = 100
    temperatures: list[float] = field(default_factory=lambda: [0.4, 0.7, 0.85, 1.0])
    samples: int = 64
    chunk: int = 256

    def __post_init__(self) -> None:
        check_fields(
            self, "report.", importance_samples=(0, 1_000_000), temperatures=(0, 100),
            samples=(1, 65536), chunk=(1, 1 << 20),
        )  # fmt: skip
        if not self.temperatures:
            raise ValueError("report.temperatures is []; it takes one or more numbers")


def write_report(
    console: Console,
    config: ReportConfig,
    data: DataConfig,
    accelerator: str,
    folder: RunFolder,
    tf32: bool = False,
) -> None:
    """Pictures and likelihood of the best checkpoint, and what to run next.

    What fails here is one line on stderr and not an error of the command: the training is done,
    and a sweep goes on to its next run.

    Args:
        console: says what there is.
        config: of the report.
        data: all images are read, not a rank's share.
        accelerator: that trained, ``cpu`` | ``gpu``.
        folder: of the run.
        tf32: of the run's trainer; the report says it.
    """
    console.print()
    anew = shell(setting("name", folder.path.name), "resume=auto")
    with _attempt("the report", folder, f"this command with {anew}"):
        checkpoint = reported_checkpoint(folder.checkpoints)
        if checkpoint.name != BEST:
            console.print(f"no {BEST}, for no validation gave a number: {checkpoint.name} instead")
        with float32_products(tf32=tf32):  # a sweep's next run has torch's own again
            device = open_device("cuda" if accelerator == "gpu" else "cpu", tf32=tf32)
            model = load_model(checkpoint).to(device)
            images = ImageData(data)
            images.setup()
            _write_parts(console, config, model, images, checkpoint, folder, tf32)
        console.print(f"""
checkpoint       {checkpoint}

next: {command("sample.py", checkpoint=checkpoint, temperature=0.7)}
      {command("evaluate.py", checkpoint=checkpoint, data__root=root_to_give(data))}
      {tensorboard(folder.path)}""")


def _write_parts(
    console: Console,
    config: ReportConfig,
    model: HierarchicalVAE,
    data: ImageData,
    checkpoint: Path,
    folder: RunFolder,
    tf32: bool,
) -> None:
    """Pictures first: they take seconds, the likelihood can take hours."""
    fewer = max(1, config.chunk // 4)
    root = root_to_give(data.config)
    file = folder.path / "samples.png"
    again = command(
        "sample.py", checkpoint=checkpoint, batch_size=fewer, temperature=config.temperatures
    )
    with _attempt(file.name, folder, again):
        sample_grid(model, config, file)
        console.print(f"samples          {file}")
    file = folder.path / "reconstructions.png"
    again = command(
        "sample.py", checkpoint=checkpoint, batch_size=fewer, mode="reconstruct", data__root=root
    )
    with _attempt(file.name, folder, again):
        reconstruction_grid(model, data, config, file)
        console.print(f"reconstructions  {file}")
    if not config.importance_samples:
        return
    file = folder.path / "test_likelihood.json"
    again = command(
        "evaluate.py", checkpoint=checkpoint, chunk=fewer, data__root=root,
        importance_samples=[config.importance_samples], tf32=tf32 or None,
    )  # fmt: skip
    with _attempt(file.name, folder, again):
        for line in likelihood_lines(test_likelihood(model, data, config, file)):
            console.print(line)
        if tf32:
            console.print(f"computed in {precision_name(tf32=tf32)}")


@contextmanager
def _attempt(what: str, folder: RunFolder, again: str) -> Iterator[None]:
    """Whatever goes wrong inside, from memory to a full disk, becomes one line on stderr."""
    try:
        yield
    except Exception as error:
        reason = brief(f"{type(error).__name__}: {error}")
        print(
            f"the run is safe in {folder.path}, but {what} could not be written ({reason}); "
            f"to do it again: {again}",
            file=sys.stderr,
        )


def reported_checkpoint(folder: Path) -> Path:
    """`best.ckpt`; the newest readable one where no validation has made it.

    Raises:
        CheckpointError: there is none.
    """
    best = folder / BEST
    if best.is_file():
        return best
    newest = newest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"no checkpoint in {folder}")
    return newest.path


def test_likelihood(
    model: HierarchicalVAE, data: ImageData, config: ReportConfig, file: Path
) -> EvaluationResult:
    """Evaluate the test images with a progress bar, and write the result to ``file``."""
    with Progress(transient=True) as progress:
        images = len(data.split("test"))
        task = progress.add_task("evaluating", total=images * config.importance_samples)
        result = evaluate(
            model,
            data.batches("test", model.device),
            importance_samples=(config.importance_samples,),
            chunk=config.chunk,
            progress=lambda rows: progress.advance(task, rows),
        )
    precision = precision_name(tf32=torch.backends.cudnn.allow_tf32)
    write_json(file, {**result.to_dict(), "precision": precision})
    return result


def sample_grid(model: HierarchicalVAE, config: ReportConfig, file: Path) -> None:
    """Grids of the same seeds at several temperatures, side by side; the likelihood's means."""
    grids = [
        sample_images(
            model, range(config.samples), temperature=t, pixel_temperature="mean",
            batch_size=config.chunk,
        )
        for t in config.temperatures
    ]  # fmt: skip
    save_grids_side_by_side(file, grids, [f"temperature {t:g}" for t in config.temperatures])


def reconstruction_grid(
    model: HierarchicalVAE,
    data: ImageData,
    config: ReportConfig,
    file: Path,
    columns: int = 16,
) -> None:
    """Test images above what the model makes of them: the mean of a draw of the latents."""
    batch = next(data.batches("test", model.device))
    x, index = batch.x[:columns], batch.index[:columns]
    latents = encode(model, x, index, batch_size=config.chunk)
    means = decode(model, latents, "mean", batch_size=config.chunk)
    save_rows(file, [x.cpu(), means], ["test image", "reconstruction"])


def likelihood_lines(result: EvaluationResult) -> list[str]:
    """The two figures of a table, in nats and bits/dim."""
    elbo, bits = result.negative_elbo, result.negative_elbo_bits_per_dim
    lines = [f"test negative ELBO  {elbo.mean:.3f} nats  {bits.mean:.4f} bits/dim"]
    lines += [
        f"test NLL (K={bound.samples})  {bound.nll.mean:.3f} nats  "
        f"{bound.bits_per_dim.mean:.4f} bits/dim  (importance-weighted)"
        for bound in result.importance_weighted
    ]
    return lines


_PLAIN = re.compile(r"[\w./:@%+-]+( [\w./:@%+-]+)*", re.ASCII)
"""What Hydra takes without quotes; spaces inside are fine."""


def setting(key: str, value: object) -> str:
    """``key=value`` for Hydra; lists of numbers keep their brackets."""
    text = str(value)
    if isinstance(value, list):
        return f"{key}=[{','.join(f'{entry:g}' for entry in value)}]"
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    # backslashes stand for themselves, except before a quote
    quoted = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), text)
    return f'{key}="{quoted}"'


def command(script: str, **settings: object) -> str:
    """``python SCRIPT key=value ...`` to paste; None leaves a setting out, ``__`` is a dot."""
    given = {key.replace("__", "."): each for key, each in settings.items() if each is not None}
    return shell("python", script, *(setting(key, each) for key, each in given.items()))


def tensorboard(folder: Path) -> str:
    """To look at a run's curves."""
    return shell("tensorboard", "--logdir", folder)


def root_to_give(data: DataConfig) -> str | None:
    """The folder of the images, where it is not the one that `configs/data` says.

    From a checkpoint comes a data set's name alone, so commands that read its images ask.
    """
    if data.format in IN_MEMORY_FORMATS:
        return None
    is_the_usual = is_known(data.name) and os.path.abspath(
        load_config(data.name).root
    ) == os.path.abspath(data.root)
    return None if is_the_usual else data.root
