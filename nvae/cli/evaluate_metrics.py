"""The sample-quality part of `evaluate.py`."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nvae.cli.checkpoint_data import pixel_protocol
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.progress import progress_bar
from nvae.data import DataConfig
from nvae.data.module import ImageDataModule
from nvae.metrics import (
    FeatureExtractor,
    FeatureSet,
    distances,
    generated_features,
    image_features,
    load_extractor,
    reference_features,
)
from nvae.metrics.distances import NEEDS_FEATURES
from nvae.models import NVAE
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


def measure(
    config: EvaluateConfig,
    model: NVAE,
    data: ImageDataModule,
    extractor: FeatureExtractor,
    rank: int,
    world: int,
) -> dict[str, Any]:
    """The metrics by name, and how many data images they compare with."""
    keep = bool(NEEDS_FEATURES & set(config.metrics))
    real = _reference(config, data, data.config, extractor, model, keep=keep, shown=rank == 0)
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
    found: dict[str, Any] = dict(distances(config.metrics, real, generated, config.distances))
    return {**found, "generated": generated.moments.count, "real": real.moments.count}


def _reference(
    config: EvaluateConfig,
    data: ImageDataModule,
    settings: DataConfig,
    extractor: FeatureExtractor,
    model: NVAE,
    *,
    keep: bool,
    shown: bool,
) -> FeatureSet:
    split = config.reference_split
    images = len(data.table(split))
    protocol = {
        "data": pixel_protocol(settings),
        "split": split,
        "images": images,
        "extractor": extractor.name,
    }

    def compute() -> FeatureSet:
        device = model.initial_state.device
        with progress_bar("data images", images, shown=shown) as advance:
            return image_features(
                _pixels(data, split, device), extractor, keep=keep, progress=advance
            )

    return reference_features(Path(config.reference_cache), protocol, compute, keep=keep)


def _pixels(data: ImageDataModule, split: str, device: Any) -> Iterator[Tensor]:
    for batch in data.batches(split, device):
        yield batch.x
