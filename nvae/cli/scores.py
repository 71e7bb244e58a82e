"""`evaluate.py mode=scores`: which images do not belong, and how well that can be told."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvae.cli.checkpoint_data import choose_data, open_checkpoint, open_data, pixel_protocol
from nvae.cli.common import progress_bar, short_hash
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.evaluation_run import (
    already_done,
    first_images,
    likelihood_protocol,
    output_path,
    process_group,
    rank_device,
    run_facts,
    statistics,
)
from nvae.cli.score_sets import (
    ImageSet,
    class_labels,
    file_names,
    known_data,
    open_other,
    splits_of,
)
from nvae.data.dataset import ImageData
from nvae.data.samplers import Shard
from nvae.evaluation import Estimate, RecordStore, evaluate
from nvae.evaluation.result import ImageRecords
from nvae.files import write_json
from nvae.models import HierarchicalVAE
from nvae.pictures import View
from nvae.scores.figures import MapRow, save_histograms, save_maps
from nvae.scores.scoring import (
    ScoreRecords,
    ScoreSettings,
    log_likelihood_maps,
    rows_per_image,
    score,
)
from nvae.scores.separation import Separation, advise, separate
from nvae.scores.table import (
    Columns,
    Reference,
    image_columns,
    score_columns,
    table_files,
    write_table,
)

OWN = "own"
"""What the results call the images that are scored; those that they are held against have names."""


@dataclass(frozen=True)
class Scored:
    """What was found of a set: a row an image, and the scores among its columns."""

    columns: Columns
    scores: Columns


def score_checkpoint(config: EvaluateConfig, given: dict[str, Any]) -> None:
    """The command with ``mode=scores``.

    Args:
        config: of the command.
        given: data settings that were typed.
    """
    opened = open_checkpoint(config.checkpoint, config.weights, config.plugins, config.settings)
    model = opened.model
    chosen = choose_data(given, opened.run_config)
    with process_group() as (rank, world):
        device = rank_device(config, rank, world)
        data = open_data(chosen, model.config)
        own = ImageSet(OWN, data, splits_of(data, config.split))
        others = [open_other(name, config, data, model) for name in config.others]
        known = None
        if config.typicality_split is not None:
            known = known_data(data, opened, model, shown=rank == 0)
        common = likelihood_protocol(config, opened)
        protocol = {
            "mode": "scores",
            **common,
            "ratio_samples": config.ratio_samples,
            "images": own.protocol(),
            "against": {other.name: other.protocol() for other in others},
            "typicality": None if known is None else _reference_protocol(config, known),
            "bootstrap": config.bootstrap if others else None,
            "maps": config.maps,
        }
        output = output_path(config, opened.file, protocol, f"scores-{config.split}")
        if already_done(output, protocol, config.overwrite, shown=rank == 0):
            return
        files = Files(output, [other.name for other in others], with_maps=config.maps > 0)
        files.check_free(overwrite=config.overwrite)
        model = model.to(device)
        model.choose_kernels(config.kernels)
        if config.maps:  # now, and not after hours
            black = torch.zeros(1, *model.config.image_shape)
            log_likelihood_maps(model, black, torch.arange(1))
        run = _Run(config, model, common, opened.file.stem, output, rank, world)
        started = monotonic()
        with statistics(config, opened.file, model, shown=rank == 0):
            reference = None if known is None else run.reference(known)
            scored = {each.name: run.score(each, reference) for each in (own, *others)}
            maps = {}
            if rank == 0 and config.maps:
                maps = {each.name: run.maps(each, scored[each.name]) for each in (own, *others)}
        if rank != 0:
            return
        found = {
            other.name: separate(
                scored[OWN].scores, scored[other.name].scores,
                resamples=config.bootstrap, seed=config.seed,
            )
            for other in others
        }  # fmt: skip
        advice = advise(found) if found else None
        density_of = model.config.pixel_distribution.density_of
        title = f"{data.config.name} {config.split}"
        print(_report(title, scored, found, reference, density_of))
        if advice is not None:
            print(f"\n{advice.text}")
        files.write(scored, maps)
        facts = run_facts(config, device, world, started)
        result = {
            "scores": {name: _summary(each) for name, each in scored.items()},
            "density_of": density_of,
            "typicality": None if reference is None else asdict(reference),
            "against": {
                name: {score: asdict(each) for score, each in separations.items()}
                for name, separations in found.items()
            },
            "advice": None if advice is None else asdict(advice),
            "files": [path.name for path in files.all],
        }
        write_json(output, {"result": result, "protocol": protocol, **facts})
        run.forget()
        print(f"\nwritten to {output}")


def _reference_protocol(config: EvaluateConfig, known: ImageData) -> dict[str, Any]:
    split = config.typicality_split
    assert split is not None
    there = len(known.split(split))
    return {
        "data": pixel_protocol(known, split),
        "split": split,
        "images": min(there, config.typicality_images or there),
    }


@dataclass(frozen=True)
class _Run:
    """What all sets are scored with.

    Attributes:
        common: the protocol without the images.
        name: of the checkpoint.
        output: the JSON file; finished images lie beside it.
        folders: where they are.
    """

    config: EvaluateConfig
    model: HierarchicalVAE
    common: dict[str, Any]
    name: str
    output: Path
    rank: int
    world: int
    folders: list[Path] = field(default_factory=list)

    @property
    def settings(self) -> ScoreSettings:
        config = self.config
        return ScoreSettings(
            tuple(config.importance_samples), config.elbo_samples, config.seed, config.chunk,
            ratio_samples=config.ratio_samples,
        )  # fmt: skip

    def forget(self) -> None:
        """Remove the finished images: they are in the result."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _store(self, protocol: dict[str, Any], kind: type[ImageRecords]) -> RecordStore:
        # by nothing but what the images' numbers depend on: the rest may change and keep them
        key = short_hash({**self.common, **protocol})
        folder = self.output.with_name(f".{self.name}-scores.partial-{key}")
        self.folders.append(folder)
        return RecordStore(folder, key, self.rank, kind)

    def reference(self, known: ImageData) -> Reference:
        """The mean negative ELBO of images that the model knows, spread evenly over the split."""
        config, protocol = self.config, _reference_protocol(self.config, known)
        split, images = protocol["split"], protocol["images"]
        stride = len(known.split(split)) // images
        mine = len(range(self.rank, images, self.world))
        shard = Shard(self.rank * stride, self.world * stride)
        batches = first_images(known.batches(split, self.model.device, shard), mine)
        with progress_bar(
            "typical images", mine * config.elbo_samples, shown=self.rank == 0
        ) as advance:
            result = evaluate(
                self.model, batches, elbo_samples=config.elbo_samples, seed=config.seed,
                chunk=config.chunk, labels=False, progress=advance,
                store=self._store(protocol, ImageRecords), distributed=self.world > 1,
            )  # fmt: skip
        return Reference(result.negative_elbo.mean, result.images, known.config.name, split)

    def score(self, images: ImageSet, reference: Reference | None) -> Scored:
        """Scores of all images of a set, on every rank."""
        settings = self.settings
        parts = []
        for split, count in images.counts(self.config.max_images).items():
            # before the work, which may take hours
            names, labels = file_names(images.data, split), class_labels(images.data, split)
            records = self._records(images, split, count)
            scores = score_columns(records, settings.importance_samples, reference)
            columns = image_columns(records, settings.importance_samples, scores, names, labels)
            if len(images.splits) > 1:
                columns = {"split": np.repeat(split, count), **columns}
            parts.append(Scored(columns, scores))
        return Scored(
            _joined([part.columns for part in parts]), _joined([part.scores for part in parts])
        )

    def _records(self, images: ImageSet, split: str, count: int) -> ScoreRecords:
        config, settings, device = self.config, self.settings, self.model.device
        mine = len(range(self.rank, count, self.world))
        source = images.data.batches(split, device, Shard(self.rank, self.world))
        batches = map(images.changed, first_images(source, mine))
        protocol = {
            "split": split, "images": images.protocol(), "ratio_samples": config.ratio_samples
        }  # fmt: skip
        store = self._store(protocol, ScoreRecords)
        with progress_bar(
            f"{images.name} {split}", mine * rows_per_image(self.model, settings),
            shown=self.rank == 0,
        ) as advance:  # fmt: skip
            records = score(
                self.model, batches, importance_samples=settings.importance_samples,
                elbo_samples=config.elbo_samples, ratio_samples=config.ratio_samples,
                seed=config.seed, chunk=config.chunk, progress=advance, store=store,
                distributed=self.world > 1,
            )  # fmt: skip
        if len(records) != count:
            raise ValueError(
                f"{store.folder} holds results of images that are not in split={split}; delete it "
                "and evaluate again"
            )
        return records

    def maps(self, images: ImageSet, scored: Scored) -> list[MapRow]:
        """The least and the most likely images of a set, with their maps, of the counted window."""
        values = scored.scores["negative_elbo"]
        order = np.argsort(values, kind="stable")
        count = min(self.config.maps, len(order))
        return [
            self._map_row("least likely", images, scored, order[::-1][:count]),
            self._map_row("most likely", images, scored, order[:count]),
        ]

    def _map_row(
        self, what: str, images: ImageSet, scored: Scored, rows: NDArray[np.int64]
    ) -> MapRow:
        columns, config = scored.columns, self.config
        pictures, maps, titles = [], [], []
        for row in rows:  # their splits may differ
            split = str(columns["split"][row]) if "split" in columns else images.splits[0]
            index = torch.tensor([int(columns["index"][row])])
            x = images.changed(images.data.some(split, index)).x
            (found,) = log_likelihood_maps(
                self.model, x, index, elbo_samples=config.elbo_samples, seed=config.seed,
                chunk=config.chunk,
            )  # fmt: skip
            window = self.model.config.counted_window
            pictures.append(View()(x)[0, :, *window])
            maps.append(found.numpy())
            name = str(columns["file"][row]) if "file" in columns else f"image {int(index)}"
            value = scored.scores["negative_elbo"][row]
            titles.append(f"{name.rpartition('/')[2][-18:]}\n{value:.1f}")
        return MapRow(f"{what} of {images.name}", torch.stack(pictures), np.stack(maps), titles)


def _joined(parts: list[Columns]) -> Columns:
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@dataclass(frozen=True)
class Files:
    """What is written beside the JSON file.

    Attributes:
        output: the JSON file.
        others: names of the sets that the images are held against.
        with_maps: pictures of likelihood maps are drawn.
    """

    output: Path
    others: Sequence[str]
    with_maps: bool

    def table(self, name: str) -> Path:
        """The CSV file of a set."""
        return self._beside("" if name == OWN else f"-against-{name}", ".csv")

    def maps(self, name: str) -> Path:
        """The picture of a set's maps."""
        return self._beside("-maps" if name == OWN else f"-against-{name}-maps", ".png")

    @property
    def histograms(self) -> Path:
        """The picture of the scores of all sets."""
        return self._beside("-histograms", ".png")

    def _beside(self, what: str, suffix: str) -> Path:
        return self.output.with_name(f"{self.output.stem}{what}{suffix}")

    @property
    def all(self) -> list[Path]:
        """Everything, in the order of the sets."""
        sets = [OWN, *self.others]
        tables = [path for name in sets for path in table_files(self.table(name))]
        maps = [self.maps(name) for name in sets] if self.with_maps else []
        return [*tables, *maps, *([self.histograms] if self.others else [])]

    def check_free(self, *, overwrite: bool) -> None:
        """Raise a ValueError where one of them is there already."""
        for path in self.all:
            if path.exists() and not overwrite:
                raise ValueError(f"{path} is there already; give another output or overwrite=true")

    def write(self, scored: Mapping[str, Scored], maps: Mapping[str, list[MapRow]]) -> None:
        """All of them."""
        for name, each in scored.items():
            write_table(self.table(name), each.columns)
        for name, rows in maps.items():
            save_maps(self.maps(name), rows)
        if self.others:
            save_histograms(self.histograms, {name: each.scores for name, each in scored.items()})


def _summary(scored: Scored) -> dict[str, Any]:
    """Of every score its mean over images."""
    means = {name: asdict(Estimate.over_images(each)) for name, each in scored.scores.items()}
    return {"images": len(scored.columns["index"]), "means": means}


def _report(
    title: str,
    scored: Mapping[str, Scored],
    found: Mapping[str, Mapping[str, Separation]],
    reference: Reference | None,
    density_of: str,
) -> str:
    """Lines for a terminal, without the advice."""
    own = scored[OWN].scores
    lines = [f"{title}: {len(scored[OWN].columns['index'])} images; nats; higher: belongs less"]
    lines += [f"{'':20}{'mean':>12}{'+-':>10}"]
    for name, values in own.items():
        mean = Estimate.over_images(values)
        lines.append(f"{name:20}{mean.mean:>12.3f}{mean.standard_error:>10.3f}")
    if reference is not None:
        lines.append(
            f"typicality is the distance of the negative ELBO from {reference.entropy:.3f}, its "
            f"mean over {reference.images} images of {reference.data} {reference.split}"
        )
    if density_of:
        lines.append(f"of the density of {density_of}, x in [0, 1]: nats may be negative")
    for other, separations in found.items():
        lines += ["", f"against {other}: {len(scored[other].columns['index'])} images"]
        lines += [f"{'':20}{'mean':>12}  {'AUROC':24}{'AUPRC':24}FPR at 95 % TPR"]
        for name, each in separations.items():
            average = float(scored[other].scores[name].mean())
            numbers = f"{each.auroc!s:24}{each.auprc!s:24}{each.fpr95}"
            lines.append(f"{name:20}{average:>12.3f}  {numbers}")
    return "\n".join(lines)
