"""`sample.py`: pictures from a checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nvae.cli.checkpoint_data import (
    OpenedCheckpoint,
    choose_data,
    open_checkpoint,
    open_data,
    pixel_protocol,
    split_off_data,
    with_data,
)
from nvae.cli.common import (
    file_sha256,
    open_device,
    progress_bar,
    recalibrated,
    short_hash,
    versions,
)
from nvae.cli.errors import run_command
from nvae.cli.sample_config import SampleConfig
from nvae.cli.sample_folder import SampleFolder
from nvae.cli.schema import build
from nvae.data.dataset import ImageData
from nvae.models import HierarchicalVAE
from nvae.ops.library import check_kernels
from nvae.pictures import needs_full_depth
from nvae.sampling import CompiledDecoder, sample_images
from nvae.sampling.grids import (
    Grid,
    column_seeds,
    interpolation_grid,
    nearest_grid,
    nearest_images,
    partial_grid,
    reconstruction_grid,
    spread,
    traversal_grid,
)
from nvae.sampling.latents import (
    Latents,
    check_group,
    check_kept,
    decode,
    encode,
    interpolate,
    prior_latents,
)

SCHEMA = with_data(SampleConfig)
_MOST_ROWS = 8
_LONGEST_LABEL = 100
_CHANGES_NO_PICTURE = (
    "checkpoint", "plugins", "batch_size", "compile", "device", "kernels", "output", "overwrite",
)  # fmt: skip


def main() -> None:
    """The command."""
    run_command("sample", _run, SCHEMA)


def _run(composed: DictConfig) -> None:
    own, given = split_off_data(composed)
    config = build(SampleConfig, own)
    device = open_device(config.device, tf32=config.tf32)
    check_kernels(config.kernels, device)
    opened = open_checkpoint(config.checkpoint, config.weights, config.plugins, config.settings)
    model = opened.model
    model.choose_kernels(config.kernels)
    needs_data = config.reads_images or config.mode == "nearest"
    data = open_data(choose_data(given, opened.run_config), model.config) if needs_data else None
    request = _request(config, opened, data)
    path = _folder(config, opened.file, request)
    config.view.of(model.config.image_channels)
    folder = SampleFolder(path, request, overwrite=config.overwrite, view=config.view)
    _Sampler(config, opened.file, model.to(device), data, folder).draw()
    folder.manifest(
        {
            "checkpoint": config.checkpoint,
            "batch_size": config.batch_size,
            "versions": versions(device),
        }
    )
    print(f"written to {folder.path}")


def _request(
    config: SampleConfig, opened: OpenedCheckpoint, data: ImageData | None
) -> dict[str, Any]:
    """Everything that the pictures depend on."""
    split = "train" if config.mode == "nearest" else config.split
    settings = {k: v for k, v in asdict(config).items() if k not in _CHANGES_NO_PICTURE}
    return {
        "checkpoint_sha256": file_sha256(opened.file),
        **settings,
        "settings": opened.settings,
        "data": None if data is None else pixel_protocol(data, split),
    }


def _folder(config: SampleConfig, weights: Path, request: dict[str, Any]) -> Path:
    if config.output is not None:
        return Path(config.output)
    name = f"{weights.stem}-{config.mode}-{short_hash(request)}"
    return weights.parent / "samples" / name


class _Sampler:
    """One request at work.

    Args:
        config: what to draw.
        weights: file they come from.
        model: on its device.
        data: where images are read, else None.
        folder: for the files.
    """

    def __init__(
        self,
        config: SampleConfig,
        weights: Path,
        model: HierarchicalVAE,
        data: ImageData | None,
        folder: SampleFolder,
    ) -> None:
        self.config, self.weights, self.model = config, weights, model
        self.data, self.folder = data, folder
        self.seeds = torch.tensor(config.seed_list)
        for keep in config.keep or () if config.mode == "partial" else ():
            check_kept(keep, model.num_groups)  # and not after minutes of encoding
        for group in config.groups or () if config.mode == "traverse" else ():
            check_group(group, model.num_groups)
        self.temperatures = [
            (_short(label, values), values) for label, values in config.temperatures(model)
        ]
        self.classes = config.class_list(model)
        self.decoder = partial(
            decode, pixel_temperature=config.pixels, batch_size=config.batch_size
        )
        self._kept: CompiledDecoder | None = None

    def draw(self) -> None:
        """Write everything but the manifest."""
        getattr(self, f"_draw_{self.config.mode}")()

    @contextmanager
    def _statistics(self, temperature: Sequence[float]) -> Iterator[None]:
        config = self.config
        if not config.recalibrate_bn:
            yield
            return
        with recalibrated(
            self.model, self.weights, temperature, batches=config.recalibrate_bn,
            batch_size=config.bn_batch_size, seed=config.bn_seed,
        ):  # fmt: skip
            yield

    def _prior(self, label: str, temperature: Sequence[float]) -> Tensor:
        """All seeds, or all seeds of every class in turn."""
        times = max(1, len(self.classes))
        with self._statistics(temperature):
            decode = self._compiled()
            with progress_bar(f"temperature {label}", times * len(self.seeds)) as advance:
                return sample_images(
                    self.model, self.seeds.repeat(times), temperature=temperature,
                    pixel_temperature=self.config.pixels, labels=self._labels(len(self.seeds)),
                    guidance=self.config.guidance, batch_size=self.config.batch_size,
                    decode=decode, progress=advance,
                )  # fmt: skip

    def _labels(self, images: int) -> Tensor | None:
        """Labels of so many images of every class asked for; None without."""
        return torch.tensor(self.classes).repeat_interleave(images) if self.classes else None

    def _compiled(self) -> CompiledDecoder | None:
        """The compiled walk with the statistics at hand, where one is asked for."""
        if not self.config.compile:
            return None
        if self._kept is None or self.config.recalibrate_bn:
            print("compiling, a minute or more", flush=True)
            self._kept = CompiledDecoder(self.model, self.config.batch_size, self.config.guidance)
        return self._kept

    def _draw_prior(self) -> None:
        grids, bits = [], self.model.config.bits
        names = [f"seed{seed:06d}" for seed in self.seeds.tolist()]
        if self.classes:
            names = [f"class{each}_{name}" for each in self.classes for name in names]
        for label, temperature in self.temperatures:
            images = self._prior(label, temperature)
            grids.append(images)
            if self.config.single_images:
                for name, image in zip(names, images, strict=True):
                    name = f"t{label.replace(', ', '_')}/{name}"
                    self.folder.image(f"{name}.png", image)
                    if self.config.full_depth and needs_full_depth(image.shape, bits):
                        self.folder.full_depth(f"{name}_full", image, bits)
        labels = [f"temperature {label}" for label, _ in self.temperatures]
        if self.classes:
            rows = [row for grid in grids for row in grid.split(len(self.seeds))]
            titles = [f"class {each}" for each in self.classes]
            if len(labels) > 1:
                titles = [f"{title}, {label}" for label in labels for title in titles]
            self.folder.sheet("grid.png", Grid(tuple(rows), tuple(titles)))
        else:
            self.folder.grids("grid.png", grids, labels, self.config.columns)
        if self.config.npz:
            used = torch.tensor([t for _, t in self.temperatures])
            own = {"classes": torch.tensor(self.classes)} if self.classes else {}
            self.folder.arrays(
                "samples.npz",
                images=torch.stack(grids), seeds=self.seeds, group_temperatures=used, **own,
            )  # fmt: skip

    def _draw_nearest(self) -> None:
        assert self.data is not None
        samples = self._prior(*self.temperatures[0])
        with progress_bar("training images", len(self.data.split("train"))) as advance:
            found = nearest_images(
                samples, _counted(self.data.batches("train"), advance), self.config.neighbors
            )
        sheet = nearest_grid(samples, found, [f"seed {s}" for s in self.seeds.tolist()])
        self.folder.sheet("nearest.png", sheet)
        self.folder.arrays("nearest.npz", index=found.index, distance=found.distance)
        self._keep(sheet.images)

    def _draw_reconstruct(self) -> None:
        x, labels = self._images()
        numbers = torch.tensor(self.config.image_list)
        sheet = reconstruction_grid(self.model, x, numbers, self.config.batch_size, labels)
        self.folder.sheet("reconstructions.png", sheet)
        self._keep(sheet.images)

    def _draw_interpolate(self) -> None:
        with self._statistics(self.temperatures[0][1]):
            latents, names = self._starts()
            sheet = interpolation_grid(self.model, latents, names, self.config.steps, self.decoder)
            self.folder.sheet("interpolation.png", sheet)
            self._keep(sheet.images)
            if self.config.frames:
                points = max(2, self.config.frames)
                path = interpolate(self.model, latents[:-1], latents[1:], points)
                name = f"interpolation.{self.config.animation}"
                self.folder.animation(name, self.decoder(self.model, path))

    def _draw_partial(self) -> None:
        temperature = self.temperatures[0][1]
        groups = self.model.num_groups
        keep = self.config.keep if self.config.keep is not None else spread(groups + 1, _MOST_ROWS)
        seeds = torch.stack([column_seeds(n, self.config.draws) for n in self._numbers])
        sheets = []
        with self._statistics(temperature):
            latents, names = self._starts()
            with progress_bar("images", len(names)) as advance:
                for i, name in enumerate(names):
                    sheet = partial_grid(
                        self.model, latents[i : i + 1], keep, seeds[i], self.decoder, temperature
                    )
                    self.folder.sheet(f"partial-{name.replace(' ', '')}.png", sheet)
                    if self.config.npz:
                        sheets.append(torch.stack(sheet.rows))
                    advance(1)
        if sheets:
            self._keep(torch.stack(sheets), keep=torch.tensor(keep), draw_seeds=seeds)

    def _draw_traverse(self) -> None:
        groups = self.config.groups
        if groups is None:
            groups = spread(self.model.num_groups, _MOST_ROWS)
        sheets = []
        with self._statistics(self.temperatures[0][1]):
            latents, names = self._starts()
            with progress_bar("images", len(names)) as advance:
                for i, name in enumerate(names):
                    sheet = traversal_grid(
                        self.model, latents[i : i + 1], groups, self.config.steps,
                        self._numbers[i], self.decoder,
                    )  # fmt: skip
                    self.folder.sheet(f"traversal-{name.replace(' ', '')}.png", sheet)
                    if self.config.npz:
                        sheets.append(torch.stack(sheet.rows))
                    advance(1)
        if sheets:
            self._keep(torch.stack(sheets), groups=torch.tensor(groups))

    @property
    def _numbers(self) -> list[int]:
        return self.config.image_list if self.config.reads_images else self.config.seed_list

    def _starts(self) -> tuple[Latents, list[str]]:
        """Latents of the images or seeds asked for, and their names."""
        if self.config.reads_images:
            x, labels = self._images()
            latents = encode(self.model, x, labels=labels, batch_size=self.config.batch_size)
            return latents, [f"image {i}" for i in self._numbers]
        latents = prior_latents(
            self.model, self.seeds, self.temperatures[0][1], self._labels(len(self.seeds))
        )
        return latents, [f"seed {s}" for s in self._numbers]

    def _images(self) -> tuple[Tensor, Tensor | None]:
        """The data images asked for, ``(N, C, H, W)``, on the model's device, and their labels."""
        assert self.data is not None
        split, wanted = self.data.split(self.config.split), torch.tensor(self.config.image_list)
        if wanted.max() >= len(split):
            raise ValueError(
                f"images names {int(wanted.max())}; split={self.config.split} has {len(split)} "
                f"images, allowed: 0 to {len(split) - 1}"
            )
        images = self.data.some(self.config.split, wanted)
        labels = self._labels(len(wanted))
        if labels is None and self.model.config.num_classes:
            labels = images.labels
        return images.x.to(self.model.device), labels

    def _keep(self, images: Tensor, **arrays: Tensor) -> None:
        """Write the images as they are where that is wanted, with what they come from."""
        if self.config.npz:
            source = "index" if self.config.reads_images else "seeds"
            arrays[source] = torch.tensor(self._numbers)
            self.folder.arrays("samples.npz", images=images, **arrays)


def _short(label: str, temperatures: Sequence[float]) -> str:
    """A label that a folder can be called: of many groups the range, and a hash of all."""
    if len(label) <= _LONGEST_LABEL:
        return label
    return f"{min(temperatures):g}-{max(temperatures):g}, {short_hash(label)}"


def _counted(batches: Iterator[Any], advance: Any) -> Iterator[Any]:
    for batch in batches:
        yield batch
        advance(len(batch.x))
