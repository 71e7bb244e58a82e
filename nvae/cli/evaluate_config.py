"""The settings of `evaluate.py`, checked."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from nvae.cli.checkpoint_data import check_split
from nvae.cli.sample_config import check_temperature, pixel_setting
from nvae.data.config import CONFIG_FOLDER, SPLITS, is_known
from nvae.evaluation import BoundSettings
from nvae.evaluation.distances import DistanceSettings, check_metrics
from nvae.ops.library import IMPLS
from nvae.sampling.prior import PixelTemperature, check_pixel_temperature
from nvae.scores.scoring import ScoreSettings
from nvae.scores.synthetic import CHANGES
from nvae.settings import Bounds, check_choice, check_fields, did_you_mean

MODES = ("likelihood", "scores")
ALL = "all"
"""In place of a split: all that a set has."""

_OF_MODE = {
    "likelihood": (
        *("metrics", "generated", "pixel_temperature", "sample_batch_size", "compile"),
        *("reference_split", "reference_cache", "inception_weights", "inception_sha256"),
        *("feature_extractor", "neighbors", "kid_subsets", "kid_subset_size"),
    ),
    "scores": (
        *("ratio_samples", "typicality_split", "typicality_images", "against", "against_root"),
        *("against_split", "bootstrap", "maps"),
    ),
}
"""Settings that only one mode reads. Scores are never told labels, as ``labels=false`` says."""

_BOUNDS: dict[str, Bounds] = {
    "max_images": (1, None),
    "recalibrate_bn": (0, 1_000_000),
    "bn_batch_size": (2, 65_536),
    "generated": (2, 10_000_000),
    "sample_batch_size": (1, 65_536),
    "neighbors": (1, 1_000_000),
    "kid_subsets": (1, 100_000),
    "kid_subset_size": (2, 1_000_000),
    "typicality_images": (1, None),
    "bootstrap": (1, 1_000_000),
    "maps": (0, 64),
}


@dataclass
class EvaluateConfig:
    """What to evaluate, and how.

    `configs/evaluate.yaml` says what each setting means.
    """

    checkpoint: str
    mode: str = "likelihood"
    split: str = "test"
    max_images: int | None = None
    plugins: list[str] = field(default_factory=list)
    settings: str | None = None
    weights: str = "ema"
    importance_samples: list[int] = field(default_factory=lambda: [1000])
    elbo_samples: int = 1
    labels: bool = True
    seed: int = 0
    chunk: int = 256
    device: str = "auto"
    kernels: str = "auto"
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
    neighbors: int = 5
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    ratio_samples: int = 1
    typicality_split: str | None = "train"
    typicality_images: int | None = 1000
    against: Any = field(default_factory=list)
    against_root: str | None = None
    against_split: str = "test"
    bootstrap: int = 200
    maps: int = 8
    output: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "", **_BOUNDS)
        check_choice("mode", self.mode, MODES)
        self._check_mode()
        if self.mode == "scores":
            self._check_scores()
        else:
            check_split(self.split)
        check_choice("reference_split", self.reference_split, SPLITS)
        check_choice("weights", self.weights, ("ema", "raw"))
        check_choice("kernels", self.kernels, IMPLS)
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

    def _check_mode(self) -> None:
        """What only one of the modes reads is refused in the other."""
        for mode, names in _OF_MODE.items():
            for each in fields(self):
                default = each.default
                if each.default_factory is not MISSING:
                    default = each.default_factory()
                value = getattr(self, each.name)
                if mode != self.mode and each.name in names and value != default:
                    shown = f"[{','.join(map(str, value))}]" if isinstance(value, list) else value
                    raise ValueError(f"{each.name}={shown} is of mode={mode}")

    def _check_scores(self) -> None:
        _ = self.others
        check_choice("split", self.split, (*SPLITS, ALL))
        check_choice("against_split", self.against_split, (*SPLITS, ALL))
        if self.typicality_split is not None:
            check_choice("typicality_split", self.typicality_split, SPLITS)
        sets = [name for name in self.others if name not in CHANGES]
        if self.against_root is not None and len(sets) != 1:
            raise ValueError(
                f"against_root={self.against_root} is the folder of one set, and against names "
                f"{', '.join(sets) or 'none'}"
            )
        _ = ScoreSettings(ratio_samples=self.ratio_samples)

    @property
    def others(self) -> tuple[str, ...]:
        """What the images are held against; a ValueError for what is neither set nor change."""
        names = [self.against] if isinstance(self.against, str) else self.against
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"against={self.against}: it takes a name, or a list of names: against=[NAME,NAME]"
            )
        known = [*CHANGES, *sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))]
        for name in names:
            if name not in CHANGES and not is_known(name):
                raise ValueError(
                    f"against={name} is unknown{did_you_mean(name, known)}; allowed: "
                    f"{', '.join(known)}"
                )
        return tuple(dict.fromkeys(names))

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
            neighbors=self.neighbors,
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
