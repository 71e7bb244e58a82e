"""The settings of `sample.py`, checked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nvae.cli.checkpoint_data import check_split
from nvae.models import HierarchicalVAE
from nvae.ops.library import IMPLS
from nvae.pictures import View, check_format
from nvae.sampling.prior import PixelTemperature, check_pixel_temperature, scale_temperatures
from nvae.settings import LARGEST_INTEGER, Bounds, check_choice, check_fields

MODES = ("prior", "reconstruct", "interpolate", "partial", "traverse", "nearest")
_FROM_SEEDS_OR_IMAGES = ("interpolate", "partial", "traverse")

MOST_NUMBERS = 1_000_000
"""Of seeds or images in one request."""

HOTTEST = 1000.0
"""Temperature; far beyond anything that gives a picture."""

_BOUNDS: dict[str, Bounds] = {
    "guidance": (0, 1000),
    "recalibrate_bn": (0, 1_000_000),
    "bn_batch_size": (2, 65_536),
    "steps": (2, 10_000),
    "frames": (0, 10_000),
    "draws": (1, 10_000),
    "neighbors": (1, 10_000),
    "batch_size": (1, 65_536),
    "columns": (1, 65_536),
    "keep": (0, 10_000),
    "groups": (0, 10_000),
}


@dataclass
class SampleConfig:
    """What to draw, and how.

    `configs/sample.yaml` says what each setting means.
    """

    checkpoint: str
    mode: str = "prior"
    plugins: list[str] = field(default_factory=list)
    settings: str | None = None
    weights: str = "ema"
    seeds: Any = None
    temperature: Any = 1.0
    scale_temperatures: list[float] | None = None
    group_temperatures: list[float] | None = None
    pixel_temperature: Any = "mean"
    classes: Any = None
    guidance: float = 1.0
    recalibrate_bn: int = 0
    bn_batch_size: int = 64
    bn_seed: int = 0
    source: str = "seeds"
    images: Any = "0-7"
    split: str = "test"
    steps: int = 9
    frames: int = 24
    animation: str = "gif"
    keep: list[int] | None = None
    draws: int = 7
    groups: list[int] | None = None
    neighbors: int = 5
    batch_size: int = 64
    compile: bool = False
    device: str = "auto"
    kernels: str = "auto"
    tf32: bool = False
    single_images: bool = True
    full_depth: bool = False
    show_channels: list[int] | None = None
    show_range: list[float] | None = None
    npz: bool = False
    columns: int | None = None
    output: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "", **_BOUNDS)
        check_choice("mode", self.mode, MODES)
        check_choice("weights", self.weights, ("ema", "raw"))
        check_choice("kernels", self.kernels, IMPLS)
        check_choice("source", self.source, ("seeds", "images"))
        check_split(self.split)
        check_format(self.animation)
        check_pixel_temperature(self.pixels)
        _ = self.seed_list, self.image_list, self.view
        for name in ("keep", "groups", "scale_temperatures", "group_temperatures"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} is empty; give at least one number, or leave it out")
        self._check_temperatures()
        self._check_classes()
        self._check_used()
        if self.compile and self.mode not in ("prior", "nearest"):
            raise ValueError(
                f"compile=true is for the many images of mode=prior and mode=nearest, not for "
                f"mode={self.mode}"
            )
        if self.recalibrate_bn and self.reads_images:
            raise ValueError(
                "recalibrate_bn fits the prior, not the posterior that images are encoded with; "
                "use it with mode=prior, mode=nearest or source=seeds"
            )

    def _check_temperatures(self) -> None:
        given = [n for n in ("scale_temperatures", "group_temperatures") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError("scale_temperatures and group_temperatures exclude each other")
        values = _numbers("temperature", self.temperature)
        if given and values != [1.0]:
            raise ValueError(f"{given[0]} takes the place of temperature; leave temperature out")
        if len(values) > 1 and self.mode != "prior":
            raise ValueError(f"mode={self.mode} takes one temperature, not {len(values)}")
        labels = [_label([value]) for value in values]  # two of a kind would share their files
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"temperature names {label} twice")
        for name in ("scale_temperatures", "group_temperatures"):
            for value in getattr(self, name) or ():
                check_temperature(name, value)
        for value in values:
            check_temperature("temperature", value)

    def _check_classes(self) -> None:
        if self.guidance != 1 and (self.classes is None or self.mode not in ("prior", "nearest")):
            raise ValueError(
                f"guidance={self.guidance:g} leads to a class; give class=NUMBER, and mode=prior "
                "or mode=nearest"
            )
        if self.classes is None or self.classes == "all":
            return
        if len(integers("classes", self.classes)) > 1 and self.mode != "prior":
            raise ValueError(f"mode={self.mode} takes one class")

    def _check_used(self) -> None:
        """Refuse what would change no picture: who sets it expects that it does."""
        if self.source == "images" and self.mode in ("prior", "nearest"):
            raise ValueError(
                f"source=images is for mode=interpolate, partial and traverse; mode={self.mode} "
                "starts from seeds"
            )
        if self.reads_images:
            self._check_used_with_images()
        if self.columns is not None and self.mode != "prior":
            raise ValueError(f"columns is for mode=prior, not for mode={self.mode}")
        if self.columns is not None and self.classes is not None:
            raise ValueError("columns and classes exclude each other: a class is one row")
        if self.full_depth and self.mode != "prior":
            raise ValueError(f"full_depth=true is for mode=prior, not for mode={self.mode}")
        if self.full_depth and not self.single_images:
            raise ValueError("full_depth=true is for single images; leave out single_images=false")
        if self.recalibrate_bn and self.classes is not None:
            raise ValueError(
                "recalibrate_bn takes statistics of samples without a class; leave out it or class"
            )

    def _check_used_with_images(self) -> None:
        if self.seeds is not None:
            raise ValueError(
                f"mode={self.mode} takes images=..., not seeds, for the images that it reads"
            )
        unused = {"pixel_temperature": self.mode == "reconstruct" and self.pixels != "mean"}
        if self.mode != "partial":  # which draws from the prior too
            unused["temperature"] = _numbers("temperature", self.temperature) != [1.0]
            unused["scale_temperatures"] = self.scale_temperatures is not None
            unused["group_temperatures"] = self.group_temperatures is not None
        for name, is_given in unused.items():
            if is_given:
                raise ValueError(
                    f"{name} changes nothing of mode={self.mode} with images; leave it out"
                )

    def class_list(self, model: HierarchicalVAE) -> list[int]:
        """The classes asked for, in the order given; empty where none are.

        Raises:
            ValueError: the model has not so many.
        """
        if self.classes is None:
            return []
        known = model.config.num_classes
        if not known:
            raise ValueError("class is given, but the model knows no classes (model.num_classes=0)")
        if self.classes == "all":
            if self.mode != "prior":
                raise ValueError(f"mode={self.mode} takes one class")
            return list(range(known))
        chosen = integers("classes", self.classes)
        if max(chosen) >= known:
            raise ValueError(f"class names {max(chosen)}; the model knows 0 to {known - 1}")
        return chosen

    @property
    def reads_images(self) -> bool:
        """Whether data images are encoded."""
        return self.mode == "reconstruct" or (
            self.mode in _FROM_SEEDS_OR_IMAGES and self.source == "images"
        )

    @property
    def seed_list(self) -> list[int]:
        """The seeds, in the order given."""
        default = "0-63" if self.mode == "prior" and self.classes is None else "0-7"
        return integers("seeds", default if self.seeds is None else self.seeds)

    @property
    def image_list(self) -> list[int]:
        """The indices of data images, in the order given."""
        return integers("images", self.images)

    @property
    def view(self) -> View:
        """What pictures show of an image."""
        return View.of_settings(self.show_channels, self.show_range)

    @property
    def pixels(self) -> PixelTemperature:
        """``"mean"`` or a number."""
        return pixel_setting(self.pixel_temperature)

    def temperatures(self, model: HierarchicalVAE) -> list[tuple[str, list[float]]]:
        """Label and one temperature a group, for every grid.

        Raises:
            ValueError: not as many temperatures as scales or groups.
        """
        if self.scale_temperatures:
            values = scale_temperatures(model, self.scale_temperatures)
            return [(_label(self.scale_temperatures), values)]
        if self.group_temperatures:
            if len(self.group_temperatures) != model.num_groups:
                raise ValueError(
                    f"group_temperatures holds {len(self.group_temperatures)} numbers; the model "
                    f"has {model.num_groups} groups"
                )
            return [(_label(self.group_temperatures), list(self.group_temperatures))]
        return [
            (_label([t]), [t] * model.num_groups) for t in _numbers("temperature", self.temperature)
        ]


def integers(name: str, value: Any) -> list[int]:
    """``7``, ``"0-63"`` or a list of those, as numbers; each at least 0, each once.

    Raises:
        ValueError: anything else.
    """
    entries = value if isinstance(value, list) else [value]
    ranges = [_range(name, entry) for entry in entries]
    # before they are spelled out; len() has no more than 63 bits
    if sum(each.stop - each.start for each in ranges) > MOST_NUMBERS:
        raise ValueError(
            f"{name} names more than {MOST_NUMBERS:,} numbers; ask for fewer at a time"
        )
    numbers = [number for each in ranges for number in each]
    if not numbers:
        raise ValueError(f"{name} is empty; give at least one number")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} names a number twice")
    return numbers


def _range(name: str, entry: Any) -> range:
    """The numbers of ``7`` or ``"0-63"``, none of them made yet."""
    found = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", "" if _is_no_text(entry) else str(entry))
    if found is None:
        raise ValueError(f"{name}={entry} is no number or range; allowed: 7, 0-63 or [0,5,9-12]")
    if max(map(len, found.groups(""))) > 19:
        raise ValueError(f"{name}={entry} is too large; allowed: 0 to 2^63 - 1")
    start, last = int(found[1]), int(found[2] or found[1])
    if last < start:
        raise ValueError(f"{name}={entry} runs backwards; write {last}-{start}")
    if last > LARGEST_INTEGER:
        raise ValueError(f"{name}={entry} is too large; allowed: 0 to 2^63 - 1")
    return range(start, last + 1)


def _is_no_text(entry: Any) -> bool:
    return isinstance(entry, bool) or not isinstance(entry, int | str)


def pixel_setting(value: Any) -> PixelTemperature:
    """``mean`` or a number, as a configuration holds it.

    Raises:
        ValueError: anything else.
    """
    if value == "mean":
        return "mean"
    if isinstance(value, list):
        raise ValueError(f"pixel_temperature={value} is not one number or mean")
    number = _numbers("pixel_temperature", value)[0]
    if number > HOTTEST:
        raise ValueError(f"pixel_temperature is {number:g}; it must be at most {HOTTEST:g}")
    return number


def check_temperature(name: str, value: float) -> None:
    """Raise a ValueError unless ``value`` is a number from 0 to ``HOTTEST``."""
    if not value >= 0:
        raise ValueError(f"{name} is {value:g}; it must be 0 or more")
    if value > HOTTEST:
        raise ValueError(f"{name} is {value:g}; it must be at most {HOTTEST:g}")


def _numbers(name: str, value: Any) -> list[float]:
    entries = value if isinstance(value, list) else [value]
    if not entries or any(isinstance(e, bool) or not isinstance(e, int | float) for e in entries):
        raise ValueError(f"{name}={value} is not a number" + (
            " or a list of numbers" if name == "temperature" else " or mean"
        ))  # fmt: skip
    return [float(entry) for entry in entries]


def _label(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
