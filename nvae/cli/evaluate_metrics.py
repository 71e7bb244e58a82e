"""The sample-quality part of `evaluate.py`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nvae.cli.checkpoint_data import pixel_protocol
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.evaluate_processes import share_of
from nvae.cli.progress import progress_bar
from nvae.data.dataset import ImageData
from nvae.evaluation.distances import NEEDS_FEATURES, check_possible, distances
from nvae.evaluation.extractors import FeatureExtractor, load_extractor
from nvae.evaluation.features import (
    FeatureSet,
    generated_features,
    image_features,
    pool_features,
    reference_features,
)
from nvae.models import HierarchicalVAE
from nvae.sampling import CompiledDecoder


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
    size = data.config.image_size
    probe = torch.zeros(2, data.config.channels, size, size, device=device)
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
        batches = (batch.x for batch in share_of(data.batches(split, device), rank, world))
        share = len(range(rank, images, world))
        with progress_bar("data images", share, shown=rank == 0) as advance:
            found = image_features(batches, extractor, keep=keep, progress=advance)
        return pool_features(found, images) if world > 1 else found

    return reference_features(
        Path(config.reference_cache), protocol, compute, keep=keep, distributed=world > 1
    )
