"""Features of many images, a batch at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nvae.metrics.distances import FeatureSet
from nvae.metrics.extractors import FeatureExtractor
from nvae.metrics.moments import FeatureMoments
from nvae.metrics.pooling import pool_features
from nvae.models import HierarchicalVAE, Temperature
from nvae.sampling import Decode, PixelTemperature, sample_images


class _Collector:
    def __init__(self, extractor: FeatureExtractor, keep: bool, keep_logits: bool) -> None:
        self._extractor, self._keep, self._keep_logits = extractor, keep, keep_logits
        self._moments: FeatureMoments | None = None
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        features, logits = self._extractor(images)
        if self._moments is None:
            self._moments = FeatureMoments.empty(features.shape[1])
        self._moments.add(features)
        if self._keep:
            self._features.append(features.cpu())
        if self._keep_logits and logits is not None:
            self._logits.append(logits.cpu())

    def result(self) -> FeatureSet:
        if self._moments is None:
            raise ValueError("no images to take features of")
        return FeatureSet(
            self._moments,
            torch.cat(self._features) if self._features else None,
            torch.cat(self._logits) if self._logits else None,
        )


def image_features(
    batches: Iterable[Tensor],
    extractor: FeatureExtractor,
    *,
    keep: bool = False,
    keep_logits: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Features of ``batches`` of images, each ``(B, C, H, W)`` in [0, 1].

    Args:
        batches: on the extractor's device.
        extractor: images to features.
        keep: keep every image's features, not their moments alone.
        keep_logits: keep every image's logits.
        progress: called with the number of images just done.

    Raises:
        ValueError: no images.
    """
    collector = _Collector(extractor, keep, keep_logits)
    for images in batches:
        collector.add(images)
        if progress is not None:
            progress(len(images))
    return collector.result()


def generated_features(
    model: HierarchicalVAE,
    extractor: FeatureExtractor,
    seeds: Sequence[int],
    *,
    temperature: Temperature = 1.0,
    pixel_temperature: PixelTemperature = 1.0,
    batch_size: int = 64,
    decode: Decode | None = None,
    keep: bool = False,
    keep_logits: bool = False,
    progress: Callable[[int], None] | None = None,
    distributed: bool = False,
) -> FeatureSet:
    """Features of samples, at the temperature asked for.

    Args:
        model: any mode.
        extractor: images to features.
        seeds: one an image.
        temperature: of the latents.
        pixel_temperature: of the pixels, or ``"mean"``.
        batch_size: images in one pass; changes nothing.
        decode: as :func:`sample_images` takes it.
        keep: keep every image's features.
        keep_logits: keep every image's logits.
        progress: called with the number of images just done by this process.
        distributed: every rank of the process group makes its share, and they are pooled as
            :func:`pool_features` does.

    Raises:
        ValueError: fewer seeds than ranks, or none.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if len(seeds) < world:
        raise ValueError(f"{len(seeds)} images cannot be shared by {world} processes")
    device = model.device
    mine = seeds[rank::world]

    def batches() -> Iterable[Tensor]:
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            yield sample_images(
                model, list(part), temperature=temperature, pixel_temperature=pixel_temperature,
                batch_size=batch_size, decode=decode,
            ).to(device)  # fmt: skip

    found = image_features(
        batches(), extractor, keep=keep, keep_logits=keep_logits, progress=progress
    )
    return pool_features(found, len(seeds)) if distributed else found
