"""`evaluate.py`: likelihood and sample quality of a checkpoint, as one JSON file and a table.

What it does with ``mode=scores`` is in :mod:`nvae.cli.scores`.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from omegaconf import DictConfig

from nvae.cli.checkpoint_data import (
    choose_data,
    open_checkpoint,
    open_data,
    pixel_protocol,
    split_off_data,
    with_data,
)
from nvae.cli.common import progress_bar, short_hash
from nvae.cli.errors import run_command
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
from nvae.cli.schema import build
from nvae.cli.scores import score_checkpoint
from nvae.data.dataset import ImageData
from nvae.data.samplers import Shard
from nvae.evaluation import EvaluationResult, RecordStore, evaluate
from nvae.evaluation.distances import NEEDS_FEATURES, check_possible, distances
from nvae.evaluation.extractors import FeatureExtractor, load_extractor
from nvae.evaluation.features import (
    FeatureSet,
    generated_features,
    image_features,
    pool_features,
    reference_features,
)
from nvae.files import write_json
from nvae.models import HierarchicalVAE
from nvae.models.very_deep import VeryDeepConfig
from nvae.sampling import CompiledDecoder
from nvae.settings import height_width

SCHEMA = with_data(EvaluateConfig)


def main() -> None:
    """The command."""
    run_command("evaluate", _run, SCHEMA)


def _run(composed: DictConfig) -> None:
    own, given = split_off_data(composed)
    config = build(EvaluateConfig, own)
    if config.mode == "scores":
        score_checkpoint(config, given)
    else:
        _evaluate(config, given)


def _evaluate(config: EvaluateConfig, given: dict[str, Any]) -> None:
    opened = open_checkpoint(config.checkpoint, config.weights, config.plugins, config.settings)
    model = opened.model
    chosen = choose_data(given, opened.run_config)
    with process_group() as (rank, world):
        device = rank_device(config, rank, world)
        extractor = open_extractor(config, device)
        data = open_data(chosen, model.config)
        images = {"data": pixel_protocol(data, config.split), "split": config.split}
        asked = config.labels and model.config.num_classes > 0
        labels = data.labels_sha256(config.split) if asked else None
        if asked and labels is None and rank == 0:
            print("note: the data has no labels, so this is of p(x), not of p(x | class)")
        likelihood = {**likelihood_protocol(config, opened, labels), **images}
        protocol = likelihood
        if extractor is not None:
            protocol = {**likelihood, "samples": metrics_protocol(config, extractor)}
        output = output_path(config, opened.file, protocol, config.split)
        if already_done(output, protocol, config.overwrite, shown=rank == 0):
            return
        model = model.to(device)
        model.choose_kernels(config.kernels)
        if extractor is not None:
            check_measurable(config, data, extractor, device, world)
        # without the settings of sample quality: they may change and keep the finished images
        key = short_hash(likelihood)
        partial = output.with_name(f".{opened.file.stem}-{config.split}.partial-{key}")
        started = monotonic()
        with statistics(config, opened.file, model, shown=rank == 0):
            store = RecordStore(partial, key, rank)
            result = _bound(config, model, data, store, rank, world)
            if rank == 0:
                print(result.table(), flush=True)
            normalized = None
            if isinstance(model.config, VeryDeepConfig) and model.config.overcounts:
                twin = RecordStore(partial.with_name(f"{partial.name}-normalized"), key, rank)
                normalized = _normalized(config, model, data, twin, rank, world)
            quality = None
            if extractor is not None:
                quality = measure(config, model, data, extractor, rank, world)
        if rank == 0:
            if quality is not None:
                print(_quality_table(quality))
            facts = run_facts(config, device, world, started)
            results = {"result": result.to_dict(), "samples": quality}
            if normalized is not None:
                results["normalized"] = normalized.to_dict()
                shutil.rmtree(twin.folder, ignore_errors=True)
            write_json(output, {**results, "protocol": protocol, **facts})
            shutil.rmtree(partial, ignore_errors=True)
            print(f"\nwritten to {output}")


_WHY_TWICE = """
The likelihood above is the published one. Its bins are wider than the gray levels are apart, so
that its masses do not sum to 1: the figures are up to 0.04 bits/dim too good, and compare with the
family's published ones alone. With bins whose masses sum to 1:
"""


def _normalized(
    config: EvaluateConfig,
    model: HierarchicalVAE,
    data: ImageData,
    store: RecordStore,
    rank: int,
    world: int,
) -> EvaluationResult:
    """The negative ELBO once more, under the likelihood whose masses sum to 1; printed."""
    published = model.config
    model.config = replace(published, normalized=True)  # type: ignore[call-arg]
    try:
        alone = replace(config, importance_samples=[])
        result = _bound(alone, model, data, store, rank, world)
    finally:
        model.config = published
    if rank == 0:
        print(_WHY_TWICE + "\n".join(result.table().splitlines()[1:5]), flush=True)
    return result


def _bound(
    config: EvaluateConfig,
    model: HierarchicalVAE,
    data: ImageData,
    store: RecordStore,
    rank: int,
    world: int,
) -> EvaluationResult:
    device = model.device
    wanted = len(data.split(config.split))
    if config.max_images is not None:
        wanted = min(wanted, config.max_images)
    images = len(range(rank, wanted, world))
    draws = config.bounds.draws
    with progress_bar("image draws", images * draws, shown=rank == 0) as advance:
        result = evaluate(
            model,
            first_images(data.batches(config.split, device, Shard(rank, world)), images),
            importance_samples=config.importance_samples,
            elbo_samples=config.elbo_samples,
            labels=config.labels,
            seed=config.seed,
            chunk=config.chunk,
            progress=advance,
            store=store,
            distributed=world > 1,
        )
    if result.images != wanted:
        raise ValueError(
            f"{store.folder} holds results of images that are not in split={config.split}; "
            "delete it and evaluate again"
        )
    return result


def _quality_table(quality: dict[str, Any]) -> str:
    lines = [f"\n{'samples':24}{quality['generated']:>12}   compared with {quality['real']} images"]
    lines += [f"{k:24}{v:>12.4f}" for k, v in quality.items() if isinstance(v, float)]
    return "\n".join(lines)


def open_extractor(config: EvaluateConfig, device: Any) -> FeatureExtractor | None:
    """The feature extractor, before any work is done; None where no metric is asked for."""
    if not config.metrics:
        return None
    weights = None if config.inception_weights is None else Path(config.inception_weights)
    return load_extractor(
        config.feature_extractor, weights=weights, sha256=config.inception_sha256, device=device
    )


def metrics_protocol(config: EvaluateConfig, extractor: FeatureExtractor) -> dict[str, Any]:
    """What the metrics depend on, besides model and data."""
    return {
        "metrics": list(config.metrics),
        "extractor": extractor.name,
        "generated": config.generated,
        "seeds": f"0-{config.generated - 1}",
        "temperature": config.temperature,
        "pixel_temperature": config.pixel_temperature,
        "reference_split": config.reference_split,
        **asdict(config.distances),
    }


def check_measurable(
    config: EvaluateConfig,
    data: ImageData,
    extractor: FeatureExtractor,
    device: torch.device,
    world: int,
) -> None:
    """Find now what :func:`measure` would only find after hours of likelihood and samples.

    Args:
        config: names the metrics.
        data: open.
        extractor: tried on two black images.
        device: of the images.
        world: number of processes.

    Raises:
        ValueError: too few images for a metric or for the processes, features of the wrong shape,
            or no class logits where a metric needs them.
    """
    real = len(data.split(config.reference_split))
    for name, images in (("reference_split", real), ("generated", config.generated)):
        if images < world:
            raise ValueError(f"{name}: {images} images cannot be shared by {world} processes")
    size = height_width(data.config.image_size)
    probe = torch.zeros(2, data.config.channels, *size, device=device)
    found = image_features([probe], extractor, keep_logits=True)
    check_possible(
        config.metrics, real, config.generated,
        logits=found.logits is not None, settings=config.distances,
    )  # fmt: skip


def measure(
    config: EvaluateConfig,
    model: HierarchicalVAE,
    data: ImageData,
    extractor: FeatureExtractor,
    rank: int,
    world: int,
) -> dict[str, Any] | None:
    """The metrics by name, and how many images they compare; None on all ranks but the first.

    Every rank takes its share of the features, data images' and samples'.
    """
    keep = bool(NEEDS_FEATURES & set(config.metrics))
    device = model.device
    real = _reference(config, data, extractor, device, rank, world, keep=keep)
    decode = None
    if config.compile:
        if rank == 0:
            print("compiling, a minute or more", flush=True)
        decode = CompiledDecoder(model, config.sample_batch_size)
    share = len(range(rank, config.generated, world))
    with progress_bar("samples", share, shown=rank == 0) as advance:
        generated = generated_features(
            model, extractor, range(config.generated), temperature=config.temperature,
            pixel_temperature=config.pixels, batch_size=config.sample_batch_size, decode=decode,
            keep=keep, keep_logits="is" in config.metrics, progress=advance,
            distributed=world > 1,
        )  # fmt: skip
    if rank != 0:
        return None
    found: dict[str, Any] = dict(distances(config.metrics, real, generated, config.distances))
    return {**found, "generated": generated.moments.count, "real": real.moments.count}


def _reference(
    config: EvaluateConfig,
    data: ImageData,
    extractor: FeatureExtractor,
    device: torch.device,
    rank: int,
    world: int,
    *,
    keep: bool,
) -> FeatureSet:
    split = config.reference_split
    images = len(data.split(split))
    protocol = {
        "data": pixel_protocol(data, split),
        "split": split,
        "images": images,
        "extractor": extractor.name,
    }

    def compute() -> FeatureSet:
        batches = (batch.x for batch in data.batches(split, device, Shard(rank, world)))
        share = len(range(rank, images, world))
        with progress_bar("data images", share, shown=rank == 0) as advance:
            found = image_features(batches, extractor, keep=keep, progress=advance)
        return pool_features(found, images) if world > 1 else found

    return reference_features(
        Path(config.reference_cache), protocol, compute, keep=keep, distributed=world > 1
    )
