"""What `evaluate.py mode=scores` scores: the model's own images, and those held against them."""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from nvae.cli.checkpoint_data import (
    ChosenData,
    OpenedCheckpoint,
    choose_data,
    open_data,
    pixel_protocol,
)
from nvae.cli.evaluate_config import ALL, EvaluateConfig
from nvae.data.config import IN_MEMORY_FORMATS, TRAIN, DataConfig, load_config
from nvae.data.conversion import picture_names
from nvae.data.dataset import ImageBatch, ImageData
from nvae.data.places import can_be_fetched
from nvae.models import HierarchicalVAE
from nvae.scores.synthetic import CHANGES, Synthetic


@dataclass(frozen=True)
class ImageSet:
    """Images to score.

    Attributes:
        name: in the results.
        data: their source, open.
        splits: of it.
        change: made to them first; None: none.
    """

    name: str
    data: ImageData
    splits: tuple[str, ...]
    change: Synthetic | None = None

    def counts(self, most: int | None) -> dict[str, int]:
        """Images of every split, so that all are ``most`` at most."""
        counts, left = {}, most
        for split in self.splits:
            counts[split] = len(self.data.split(split))
            if left is not None:
                counts[split] = min(counts[split], left)
                left -= counts[split]
        return {split: count for split, count in counts.items() if count}

    def changed(self, batch: ImageBatch) -> ImageBatch:
        """Images of the source as they are scored."""
        if self.change is None:
            return batch
        return replace(batch, x=self.change.of(batch.x, batch.index))

    def protocol(self) -> dict[str, Any]:
        """What its images depend on."""
        pixels = {split: pixel_protocol(self.data, split) for split in self.splits}
        change = None if self.change is None else asdict(self.change)
        if change is not None and isinstance(change["counted_size"], tuple):
            change["counted_size"] = list(change["counted_size"])  # as JSON gives it back
        return {"splits": pixels, "change": change}


def splits_of(data: ImageData, split: str) -> tuple[str, ...]:
    """One split, or all that a set has itself."""
    return data.names if split == ALL else (split,)


def open_other(
    name: str, config: EvaluateConfig, own: ImageData, model: HierarchicalVAE
) -> ImageSet:
    """What the images are held against: a set, converted to the model's images, or changed ones.

    Raises:
        ValueError: it cannot be converted, or is not there.
    """
    if name in CHANGES:
        bits = None if own.config.floats else own.config.bits
        if name == "faded" and bits == 1:
            raise ValueError("against=faded: images of one bit, half as bright, are all black")
        change = Synthetic(name, bits, own.config.counted_size, config.seed)
        return ImageSet(name, own, splits_of(own, config.split), change)
    other = converted(name, config.against_root, own.config)
    data = open_data(ChosenData(other, prepare=True), replace(model.config, num_classes=0))
    return ImageSet(name, data, splits_of(data, config.against_split))


_TAKEN_OVER = (
    *("image_size", "pad", "channels", "bits", "floats", "counted_size", "likelihood", "binarize"),
    *("eval_seed", "eval_batch_size", "num_workers", "on_device", "on_device_limit"),
)


def converted(name: str, root: str | None, own: DataConfig) -> DataConfig:
    """A set of `configs/data` as images of another one's size, channels and bits.

    Args:
        name: of the set; where it is the other one's own, files are read as that one's are.
        root: its folder; None: the configured one.
        own: the other set.

    Raises:
        ValueError: a number of channels or a depth that the set's images cannot be given.
    """
    is_alike = name == own.name
    here = own if is_alike else load_config(name)
    if here.format in IN_MEMORY_FORMATS or can_be_fetched(here):
        # of files of one's own it is not known what they hold before they are read
        if here.channels != own.channels and {here.channels, own.channels} != {1, 3}:
            raise ValueError(
                f"against={name}: its images have {here.channels} channels, the model's "
                f"{own.channels}; only gray and color are made of each other"
            )
        if (own.bits > here.bits and own.bits > 8) or (own.floats and not here.floats):
            depth = "floating-point pixels" if own.floats else f"{own.bits} bits"
            raise ValueError(
                f"against={name}: its images have {here.bits} bits, and the model's {depth} cannot "
                "be made of them"
            )
    values = {field: getattr(own, field) for field in _TAKEN_OVER}
    if root is not None:
        values |= {"root": root, "source": None}
        if is_alike:  # other files are as many as they are
            values |= dict.fromkeys(("train_size", "valid_size", "test_size"))
    resize = "bilinear" if here.resize == "none" else here.resize
    return replace(here, **values, resize=resize, flip=False, labels="auto")


def known_data(
    data: ImageData, opened: OpenedCheckpoint, model: HierarchicalVAE, *, shown: bool
) -> ImageData | None:
    """The set that the model was trained on; None where it is not here.

    Its training images must be those whose SHA-256 the checkpoint holds. A checkpoint that holds
    none is believed the name of its set, or else ``data`` is taken, and a note says so.
    """
    recorded = opened.run_config.get("data")
    name = recorded.get("name") if isinstance(recorded, dict) else None
    wanted = opened.train_sha256
    try:
        is_own = name in (None, data.config.name) if wanted is None else _trained_on(data, wanted)
        own = data if is_own else open_data(choose_data({}, opened.run_config), model.config)
        if wanted is not None and not _trained_on(own, wanted):
            raise ValueError(f"the training images of {own.config.name} are others")
    except (ValueError, OSError) as error:
        if shown:
            print(f"note: no typicality, for the model's own images are not here: {error}")
        return None
    if wanted is None and shown:
        print(
            "note: it is not known which images the model was trained on; typicality takes those "
            f"of {own.config.name}"
        )
    return own


def _trained_on(data: ImageData, sha256: str) -> bool:
    return data.split(TRAIN).sha256 == sha256


def file_names(data: ImageData, split: str) -> list[str] | None:
    """Paths of a split's pictures below their source, by index; None where they are not known."""
    found = picture_names(data.config, data.resolved(split))
    # a name that is no text would stop the writers of tables
    return found and [os.fsencode(name).decode("utf-8", "replace") for name in found]


def class_labels(data: ImageData, split: str) -> list[str] | None:
    """Names of the classes of a split's images, by index; None where they are not known."""
    labels = data.split(split).labels
    if labels is None:
        return None
    return [data.classes[i] if 0 <= i < len(data.classes) else "" for i in labels.tolist()]
