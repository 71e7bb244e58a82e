"""The settings of `evaluate.py`, checked."""

from dataclasses import dataclass, field
from typing import Any

from nvae.cli.checkpoint_data import check_split
from nvae.cli.sample_config import check_temperature, pixel_setting
from nvae.data.config import SPLITS
from nvae.evaluation import BoundSettings
from nvae.evaluation.distances import DistanceSettings, check_metrics
from nvae.sampling.prior import PixelTemperature, check_pixel_temperature
from nvae.settings import Bounds, check_choice, check_fields

_BOUNDS: dict[str, Bounds] = {
    "recalibrate_bn": (0, 1_000_000),
    "bn_batch_size": (2, 65_536),
    "generated": (2, 10_000_000),
    "sample_batch_size": (1, 65_536),
    "neighbours": (1, 1_000_000),
    "kid_subsets": (1, 100_000),
    "kid_subset_size": (2, 1_000_000),
}


@dataclass
class EvaluateConfig:
    """What to evaluate, and how.

    Attributes:
        checkpoint: a file of this project or in the published format, or an exported folder.
        split: ``train`` | ``valid`` | ``test``: images whose likelihood is taken.
        plugins: your own likelihoods and cell families that the checkpoint names, each
            ``package.module:NAME``; nothing else that it names is imported.
        weights: ``ema`` takes averaged weights where there are any, ``raw`` never.
        importance_samples: values of K of the importance-weighted bound; [] for the ELBO alone.
        elbo_samples: draws that the ELBO is averaged over.
        seed: of the posterior's noise.
        chunk: rows (images times draws) in one pass; bounds the memory, changes no number.
        device: ``auto`` | ``cpu`` | ``cuda`` | ``cuda:N``.
        tf32: faster and less exact arithmetic on NVIDIA GPUs.
        recalibrate_bn: passes that BN statistics are taken anew over; 0 keeps the running ones.
            They hold for likelihood and samples alike.
        bn_temperature: of those passes; null: ``temperature``.
        bn_batch_size: images in each.
        bn_seed: of their noise.
        metrics: of sample quality, any of ``fid``, ``kid``, ``prdc``, ``is``.
        generated: samples drawn for them, from seeds 0, 1, ...
        temperature: of the samples' latents.
        pixel_temperature: of the samples' pixels, or ``mean``.
        sample_batch_size: samples in one pass; changes no number.
        compile: compile the walk that draws them; a minute or more at the start, then faster.
        reference_split: data images that samples are compared with.
        reference_cache: folder that keeps the data images' features.
        inception_weights: file with the weights; null downloads them once.
        inception_sha256: how the file's SHA-256 begins, where it is not the published one.
        feature_extractor: ``module:attribute`` in place of Inception.
        neighbours: k of prdc.
        kid_subsets: subsets that KID is averaged over.
        kid_subset_size: images in each.
        output: the JSON file; null: beside the checkpoint, in `evaluation/`.
        overwrite: replace a result that is there, made with these settings or others.
    """

    checkpoint: str
    split: str = "test"
    plugins: list[str] = field(default_factory=list)
    weights: str = "ema"
    importance_samples: list[int] = field(default_factory=lambda: [1000])
    elbo_samples: int = 1
    seed: int = 0
    chunk: int = 256
    device: str = "auto"
    tf32: bool = False
    recalibrate_bn: int = 0
    bn_temperature: float | None = None
    bn_batch_size: int = 64
    bn_seed: int = 0
    metrics: list[str] = field(default_factory=list)
    generated: int = 50000
    temperature: float = 1.0
    pixel_temperature: Any = 1.0
    sample_batch_size: int = 64
    compile: bool = False
    reference_split: str = "train"
    reference_cache: str = "data/reference_features"
    inception_weights: str | None = None
    inception_sha256: str | None = None
    feature_extractor: str | None = None
    neighbours: int = 5
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    output: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "", **_BOUNDS)
        check_split(self.split)
        check_choice("reference_split", self.reference_split, SPLITS)
        check_choice("weights", self.weights, ("ema", "raw"))
        for name in ("temperature", "bn_temperature"):
            if getattr(self, name) is not None:
                check_temperature(name, getattr(self, name))
        if self.output is not None and not self.output.endswith(".json"):
            raise ValueError(f"output={self.output} must end in .json")
        check_metrics(self.metrics)
        if "kid" in self.metrics and self.generated < self.kid_subset_size:
            raise ValueError(
                f"kid_subset_size={self.kid_subset_size} is more than generated={self.generated}"
            )
        check_pixel_temperature(self.pixels)
        _ = self.bounds

    @property
    def bounds(self) -> BoundSettings:
        """Draws and seed; a ValueError where impossible."""
        return BoundSettings(
            tuple(self.importance_samples), self.elbo_samples, self.seed, self.chunk
        )

    @property
    def distances(self) -> DistanceSettings:
        """Choices of the metrics."""
        return DistanceSettings(
            neighbours=self.neighbours,
            kid_subsets=self.kid_subsets,
            kid_subset_size=self.kid_subset_size,
        )

    @property
    def pixels(self) -> PixelTemperature:
        """``"mean"`` or a number."""
        return pixel_setting(self.pixel_temperature)

    @property
    def statistics_temperature(self) -> float:
        """Of recalibrated BN statistics."""
        return self.temperature if self.bn_temperature is None else self.bn_temperature
