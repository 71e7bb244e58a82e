"""What a finished run says about itself: sample and reconstruction grids, test likelihood."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from nvae.checkpoint import CheckpointError, load_model
from nvae.cli.common import float32_products, open_device, precision_name
from nvae.command_line import brief, setting, shell
from nvae.data import DataConfig
from nvae.data.config import IN_MEMORY_FORMATS, is_known, load_config
from nvae.data.dataset import ImageBatch, ImageData
from nvae.evaluation import EvaluationResult, evaluate
from nvae.evaluation.likelihood import BoundSettings
from nvae.files import write_json
from nvae.models import HierarchicalVAE, plugins_of
from nvae.pictures import View, save_grids_side_by_side, save_rows
from nvae.sampling import decode, encode, sample_images
from nvae.settings import check_choice, check_fields
from nvae.training.checkpointing import BEST, newest_checkpoint
from nvae.training.ranks import has_others, is_first_rank, on_first_rank, together
from nvae.training.run_folder import RunFolder

WHEN = ("end", "never")

_PATIENCE = timedelta(days=7)
"""A process that is done waits for the slowest, which may be far behind on another GPU."""


@dataclass
class ReportConfig:
    """The report at the end of training.

    Attributes:
        when: ``end`` of training, with all its processes; ``never``: left to a later start of the
            same command.
        importance_samples: draws of the importance-weighted bound; 0: no evaluation.
        temperatures: of the latents, one sample grid each.
        samples: pictures in each grid.
        chunk: images, or rows of the evaluation, in one pass; bounds the memory.
        show_channels: see :class:`~nvae.pictures.View`.
        show_range: values that are shown as black and as white; null: 0 and 1.
    """

    when: str = "end"
    importance_samples: int = 100
    temperatures: list[float] = field(default_factory=lambda: [0.4, 0.7, 0.85, 1.0])
    samples: int = 64
    chunk: int = 256
    show_channels: list[int] | None = None
    show_range: list[float] | None = None

    def __post_init__(self) -> None:
        check_choice("report.when", self.when, WHEN)
        check_fields(
            self, "report.", importance_samples=(0, 1_000_000), temperatures=(0, 100),
            samples=(1, 65536), chunk=(1, 1 << 20),
        )  # fmt: skip
        if not self.temperatures:
            raise ValueError("report.temperatures is []; it takes one or more numbers")
        _ = self.view

    @property
    def view(self) -> View:
        """What pictures show of an image."""
        return View.of_settings(self.show_channels, self.show_range)


def write_report(
    console: Console,
    config: ReportConfig,
    data: DataConfig,
    accelerator: str,
    folder: RunFolder,
    tf32: bool = False,
    kernels: str = "auto",
) -> None:
    """Pictures and likelihood of the best checkpoint, and what to run next.

    What fails here is one line on stderr and not an error of the command: the training is done,
    and a sweep goes on to its next run. Where there is a process group all ranks call this, and
    share the likelihood's images; the first one draws the pictures and speaks.

    Args:
        console: says what there is.
        config: of the report.
        data: all images are read, not a rank's share.
        accelerator: that trained, ``cpu`` | ``gpu``.
        folder: of the run.
        tf32: of the run's trainer; the report says it.
        kernels: the run's choice.
    """
    is_first = is_first_rank()
    anew = shell(setting("name", folder.path.name), "resume=auto")
    if config.when == "never":
        if is_first:
            console.print(f"""
no report, since report.when=never; this command with {anew} report.when=end makes it
{tensorboard(folder.path)}""")
        return
    if is_first:
        console.print()
    with _attempt("the report", folder, f"this command with {anew}", said=is_first):
        checkpoint = on_first_rank(lambda: reported_checkpoint(folder.checkpoints))
        if checkpoint.name != BEST and is_first:
            console.print(f"no {BEST}, for no validation gave a number: {checkpoint.name} instead")
        name = "cuda" if accelerator == "gpu" else "cpu"  # this rank's own GPU
        with float32_products(tf32=tf32):  # a sweep's next run has torch's own again
            with together():
                model = load_model(checkpoint).to(open_device(name, tf32=tf32))
                model.choose_kernels(kernels)
                images = ImageData(data)
                images.setup()
            if is_first:
                _draw_pictures(console, config, model, images, checkpoint, folder)
            if config.importance_samples:
                _evaluate(console, config, model, images, checkpoint, folder, tf32)
        if is_first:
            plugins, root = plugins_of(model), root_to_give(data)
            console.print(f"""
checkpoint       {checkpoint}

next: {command("sample.py", checkpoint=checkpoint, plugins=plugins, temperature=0.7)}
      {command("evaluate.py", checkpoint=checkpoint, plugins=plugins, data__root=root)}
      {tensorboard(folder.path)}""")


def _draw_pictures(
    console: Console,
    config: ReportConfig,
    model: HierarchicalVAE,
    data: ImageData,
    checkpoint: Path,
    folder: RunFolder,
) -> None:
    """They take seconds, the likelihood can take hours."""
    fewer = max(1, config.chunk // 4)
    root, plugins = root_to_give(data.config), plugins_of(model)
    file = folder.path / "samples.png"
    again = command(
        "sample.py", checkpoint=checkpoint, plugins=plugins, batch_size=fewer,
        temperature=config.temperatures,
    )  # fmt: skip
    with _attempt(file.name, folder, again):
        sample_grid(model, config, file)
        console.print(f"samples          {file}")
    file = folder.path / "reconstructions.png"
    again = command(
        "sample.py", checkpoint=checkpoint, plugins=plugins, batch_size=fewer, mode="reconstruct",
        data__root=root,
    )  # fmt: skip
    with _attempt(file.name, folder, again):
        reconstruction_grid(model, data, config, file)
        console.print(f"reconstructions  {file}")


def _evaluate(
    console: Console,
    config: ReportConfig,
    model: HierarchicalVAE,
    data: ImageData,
    checkpoint: Path,
    folder: RunFolder,
    tf32: bool,
) -> None:
    """Every rank works on its share of the images."""
    file = folder.path / "test_likelihood.json"
    again = command(
        "evaluate.py", checkpoint=checkpoint, plugins=plugins_of(model),
        chunk=max(1, config.chunk // 4), data__root=root_to_give(data.config),
        importance_samples=[config.importance_samples], tf32=tf32 or None,
    )  # fmt: skip
    is_first = is_first_rank()
    with _attempt(file.name, folder, again, said=is_first):
        result = test_likelihood(model, data, config)
        if is_first:
            precision = precision_name(tf32=tf32)
            write_json(file, {**result.to_dict(), "precision": precision})
            for line in likelihood_lines(result):
                console.print(line)
            if tf32:
                console.print(f"computed in {precision}")


@contextmanager
def _attempt(what: str, folder: RunFolder, again: str, *, said: bool = True) -> Iterator[None]:
    """Whatever goes wrong inside, from memory to a full disk, becomes one line on stderr."""
    try:
        yield
    except Exception as error:
        if not said:  # but by the first rank
            return
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
    model: HierarchicalVAE, data: ImageData, config: ReportConfig
) -> EvaluationResult:
    """Evaluate the test images with a progress bar; with several ranks every one calls this."""
    rank, world = 0, 1
    group: Any = None
    if has_others():
        rank, world = dist.get_rank(), dist.get_world_size()
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    samples = (config.importance_samples,)
    size = BoundSettings(samples, chunk=config.chunk).images_per_pass
    with Progress(transient=True, disable=rank > 0) as progress:
        images = len(data.split("test"))
        task = progress.add_task("evaluating", total=images * config.importance_samples / world)
        return evaluate(
            model,
            passes_of(data.batches("test", model.device), size, rank, world),
            importance_samples=samples,
            chunk=config.chunk,
            progress=lambda rows: progress.advance(task, rows),
            distributed=world > 1,
            group=group,
        )


def passes_of(
    batches: Iterator[ImageBatch], size: int, rank: int, world: int
) -> Iterator[ImageBatch]:
    """Every ``world``-th pass of ``size`` images, cut as one process cuts them: arithmetic rounds
    by what it works on together."""
    number = 0
    for batch in batches:
        for start in range(0, len(batch.x), size):
            if number % world == rank:
                yield batch[start : start + size]
            number += 1


def sample_grid(model: HierarchicalVAE, config: ReportConfig, file: Path) -> None:
    """Grids of the same seeds at several temperatures, side by side; the likelihood's means."""
    grids = [
        sample_images(
            model, range(config.samples), temperature=t, pixel_temperature="mean",
            labels=model.labels_in_turn(config.samples), batch_size=config.chunk,
        )
        for t in config.temperatures
    ]  # fmt: skip
    grids = [config.view(images) for images in grids]
    save_grids_side_by_side(file, grids, [f"temperature {t:g}" for t in config.temperatures])


def reconstruction_grid(
    model: HierarchicalVAE,
    data: ImageData,
    config: ReportConfig,
    file: Path,
    columns: int = 16,
) -> None:
    """Test images above what the model makes of them: the mean of a draw of the latents."""
    batch = next(data.batches("test", model.device))[:columns]
    labels = model.labels_of(batch)
    latents = encode(model, batch.x, batch.index, labels=labels, batch_size=config.chunk)
    means = decode(model, latents, "mean", batch_size=config.chunk)
    rows = [config.view(images) for images in (batch.x.cpu(), means)]
    save_rows(file, rows, ["test image", "reconstruction"])


def likelihood_lines(result: EvaluationResult) -> list[str]:
    """The two figures of a table, in nats and bits/dim."""
    elbo, bits = result.negative_elbo, result.negative_elbo_bits_per_dim
    lines = [f"test negative ELBO  {elbo.mean:.3f} nats  {bits.mean:.4f} bits/dim"]
    lines += [
        f"test NLL (K={bound.samples})  {bound.nll.mean:.3f} nats  "
        f"{bound.bits_per_dim.mean:.4f} bits/dim  (importance-weighted)"
        for bound in result.importance_weighted
    ]
    if result.density_of:
        lines.append(f"(of the density of {result.density_of}, x in [0, 1]: no code length)")
    return lines


def command(script: str, **settings: object) -> str:
    """``python SCRIPT key=value ...`` to paste; None and [] are left out, ``__`` is a dot."""
    given = {k.replace("__", "."): v for k, v in settings.items() if v not in (None, [])}
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
