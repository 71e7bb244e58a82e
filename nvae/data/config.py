"""The configuration of a data set, and those that `configs/data` describes by name."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from nvae.command_line import brief, shell
from nvae.files import read_yaml
from nvae.settings import (
    CONFIGS,
    LARGEST_INTEGER,
    Size,
    check_fields,
    height_width,
    plain_size,
    show_size,
)

TRAIN, VALID, TEST = "train", "valid", "test"
SPLITS = (TRAIN, VALID, TEST)

IN_MEMORY_FORMATS = ("digits", "random")
"""Made in memory at start: nothing on disk, nothing to prepare."""

READERS = {
    "idx": "nvae.data.readers.arrays:Idx",
    "stacked_idx": "nvae.data.readers.arrays:StackedIdx",
    "cifar": "nvae.data.readers.arrays:Cifar",
    "omniglot": "nvae.data.readers.arrays:Omniglot",
    "npz": "nvae.data.readers.npz_batches:Npz",
    "celeba": "nvae.data.readers.pictures:CelebA",
    "folder": "nvae.data.readers.pictures:Folder",
    "tfrecord": "nvae.data.readers.tfrecord:TFRecord",
    "lmdb": "nvae.data.readers.lmdb:ReferenceLmdb",
    "lsun": "nvae.data.readers.lmdb:Lsun",
    "arrays": "nvae.data.readers.array_files:Arrays",
    "huggingface": "nvae.data.readers.objects:HuggingFace",
    "dataset": "nvae.data.readers.objects:Datasets",
}
"""The reader of each format of source files, imported when a source is read. A format may also be
such a `package.module:Class` itself; see :func:`nvae.data.readers.read_source`."""

SOURCE_FORMATS = ("auto", *READERS)
"""`auto` looks what is there: an LMDB, TFRecords, arrays, a data set of the hub, or pictures."""

CROPS = ("none", "center", "random")
RESIZES = ("none", "nearest", "box", "bilinear", "bicubic", "lanczos")
LABELS = ("auto", True, False)
LARGEST_SIDE = 65_536
"""Pixels along one side of any picture."""
MOST_IMAGES = 100_000_000
"""In a split: the order of so many can still be drawn in memory."""

_CHOICES = {
    "format": (*IN_MEMORY_FORMATS, *SOURCE_FORMATS),
    "likelihood": ("bernoulli", "logistic_mixture", "normal"),
    "binarize": ("none", "dynamic", "static"),
    "crop": CROPS,
    "resize": RESIZES,
    "on_device": ("auto", "always", "never"),
    "labels": LABELS,
    "torchvision": ("MNIST", "FashionMNIST", "CIFAR10", "CelebA", None),
}
_BOUNDS: dict[str, tuple[int, int]] = {
    "image_size": (1, 4096),
    "channels": (1, 1024),
    "bits": (1, 16),
    "value_range": (-(10**12), 10**12),
    "counted_size": (1, 4096),
    "pad": (0, 2048),
    "crop_box": (0, LARGEST_SIDE),
    "batch_size": (1, 65_536),
    "global_batch": (1, MOST_IMAGES),
    "eval_batch_size": (1, 65_536),
    "num_workers": (0, 256),
    "on_device_limit": (0, 1 << 24),
    "train_size": (1, MOST_IMAGES),
    "valid_size": (0, MOST_IMAGES),
    "test_size": (0, MOST_IMAGES),
    "split_seed": (0, LARGEST_INTEGER),
    "seed": (0, LARGEST_INTEGER),
    "eval_seed": (0, LARGEST_INTEGER),
}


class DataError(ValueError):
    """Source files or a prepared data set are missing or bad; the message is one clear line."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


@dataclass
class DataConfig:
    """Everything the pipeline must know; nothing is derived from the name of a data set.

    The model reads `image_size`, `channels`, `bits`, `likelihood` and `counted_size` from here
    by interpolation.

    Attributes:
        name: label in logs and manifests.
        format: kind of the source files (`SOURCE_FORMATS`, or `package.module:Class` for a reader
            of your own), or made in memory (`IN_MEMORY_FORMATS`).
        root: folder of the data set; the prepared form lies in a folder inside, named after its
            shape. A folder that is a prepared form is taken as such. Where the pictures lie in
            `root` itself (or it is an archive of them), nothing is written there: see `cache`.
        source: folder or file that holds the source files; null means `root/source`.
        cache: where the prepared forms of folders go that hold nothing but the user's pictures;
            null means `nvae/data` in `$XDG_CACHE_HOME` or `~/.cache`.
        image_size: of the model's input, padding included: the side of a square, or height and
            width.
        channels: 1 (gray), 3 (color), or as many as the source has.
        bits: levels of the input are 2^bits, 1 to 16; 1 where binarized. The level k reaches the
            model as k / (2^bits - 1).
        likelihood: the pixel distribution that suits the set.
        counted_size: the likelihood counts the central window of this size; null counts all.
        floats: keep pixels as float32 in [0, 1] instead of levels, for `likelihood: normal`.
        value_range: the least and the greatest value that pixels of the source may have; they
            become 0 and 1. Integers fall into 2^bits equal bins of the range, which changes none
            where it has 2^bits values. null: numbers with a point are in [0, 1]; pictures of 8
            and 16 bits use their whole range where `bits` is at most 8; beyond, integers are the
            levels 0 to 2^bits - 1 themselves.
        labels: class labels. `auto`: the prepared form keeps them where every picture has one;
            `true`: they must be there, and batches hold them; `false`: they are passed over.
        binarize: `dynamic` draws a fresh Bernoulli each time a training image is read (evaluation
            is drawn once, from `eval_seed`); `static` draws once for training too.
        pad: zeros added on each side, so the prepared images have sides image_size - 2 * pad.
        flip: horizontal flip with probability 1/2, in training only.
        crop: after `crop_box`, how a picture gets the proportions of `image_size`: `center`,
            `random` (in training, along the side that is too long; evaluation takes the center),
            or `none` (the picture is squeezed).
        crop_box: (left, top, right, bottom) in pixels of the source image; null takes all.
        resize: filter used when source and prepared sizes differ; `none` refuses such pictures.
        global_batch: training images an optimizer step, over all devices: each takes its share, in
            micro-batches of at most `batch_size`. null: `batch_size` on each device, times
            `trainer.accumulate_grad_batches`.
        batch_size: the most training images that a device takes at once.
        eval_batch_size: images a step in validation and test, on each device.
        num_workers: threads that read ahead; 0 reads in the calling thread.
        on_device: keep the whole set on the device: `always`, `never`, or `auto` (when it takes
            at most `on_device_limit` MiB).
        on_device_limit: see `on_device`, in MiB.
        download: fetch missing source files where a public address exists.
        dataset: a torch `Dataset` to take the images from, as Hydra writes objects, `_target_` and
            arguments; or one for each of `train`, `valid` and `test`.
        image_key: name of the images where a file or an entry holds several things by name.
        label_key: name of the labels there.
        torchvision: class of torchvision.datasets that knows where the source files are.
        urls: addresses of source files that torchvision does not know.
        files: the source files by name, for whoever fetches them by hand.
        homepage: where they are to be had.
        train_size, valid_size, test_size: images in each split. A source that lacks a split gets
            it drawn from its training part. 0 in `valid_size` means that validation reads the test
            images, and the other way round; null takes what the source has.
        split_seed: seed of the drawn splits.
        seed: seed of order and augmentation.
        eval_seed: seed of the fixed binarization, apart from `seed` so that a test NLL is one
            number for all training seeds.
        licence: what the set's owner allows, in a line.
        citation: whom to cite.
    """

    name: str
    format: str
    image_size: Size
    channels: int
    bits: int
    likelihood: str
    root: str = "data"
    source: str | None = None
    cache: str | None = None
    counted_size: Size | None = None
    floats: bool = False
    value_range: list[float] | None = None
    labels: bool | str = "auto"
    binarize: str = "none"
    pad: int = 0
    flip: bool = False
    crop: str = "center"
    crop_box: list[int] | None = None
    resize: str = "bilinear"
    global_batch: int | None = None
    batch_size: int = 32
    eval_batch_size: int = 100
    num_workers: int = 2
    on_device: str = "auto"
    on_device_limit: int = 1024
    download: bool = True
    dataset: dict[str, Any] = field(default_factory=dict)
    image_key: str | None = None
    label_key: str | None = None
    torchvision: str | None = None
    urls: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    homepage: str = ""
    train_size: int | None = None
    valid_size: int | None = None
    test_size: int | None = None
    split_seed: int = 0
    seed: int = 0
    eval_seed: int = 0
    licence: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        self.image_size = plain_size(self.image_size)
        self.counted_size = plain_size(self.counted_size)
        check_fields(self, "data.", **_BOUNDS)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            # A reader or a likelihood from elsewhere is looked up where it is used.
            is_foreign = name in ("format", "likelihood") and ":" in value
            if value not in allowed and not is_foreign:
                names = ", ".join(_typed(each) for each in allowed if each is not None)
                raise ValueError(f"data.{name} is {value!r}; allowed: {names}")
        if self.on_device == "always" and self.crop == "random":
            raise ValueError(
                "data.on_device=always needs images of one size, which data.crop=random does not "
                "make; allowed with it: auto, never"
            )
        if self.dataset and self.format == "auto":
            self.format = "dataset"
        if (self.format == "dataset") != bool(self.dataset):
            raise ValueError(
                f"data.format is {self.format} and data.dataset is {self.dataset or 'not given'}; "
                "data.format=dataset takes a data.dataset with a _target_, and nothing else does"
            )
        self._check_pixels()
        self._check_geometry()

    def _check_pixels(self) -> None:
        if self.binarize != "none" and self.bits != 1:
            raise ValueError(
                f"data.bits is {self.bits} but data.binarize={self.binarize} makes pixels of one "
                "bit; set data.bits=1 or data.binarize=none"
            )
        if self.floats and (self.likelihood in ("bernoulli", "logistic_mixture")):
            raise ValueError(
                f"data.likelihood={self.likelihood} is of levels, which data.floats=true does not "
                "make; allowed with it: normal"
            )
        if self.floats and self.binarize != "none":
            raise ValueError(f"data.floats=true leaves nothing for data.binarize={self.binarize}")
        if self.value_range is not None and not (
            len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]
        ):
            raise ValueError(
                f"data.value_range is {self.value_range}; it takes two numbers, the lower first"
            )

    def _check_geometry(self) -> None:
        sides, shown = height_width(self.image_size), show_size(self.image_size)
        if min(sides) <= 2 * self.pad:
            raise ValueError(
                f"data.pad is {self.pad}; it must be less than half of data.image_size={shown}"
            )
        if self.counted_size is not None:
            counted = height_width(self.counted_size)
            if any(c > s or (s - c) % 2 for c, s in zip(counted, sides, strict=True)):
                raise ValueError(
                    f"data.counted_size is {show_size(self.counted_size)}; it must be at most "
                    f"data.image_size={shown} and leave an equal border on both sides"
                )
        if self.crop_box is not None:
            if len(self.crop_box) != 4:
                raise ValueError(
                    f"data.crop_box has {len(self.crop_box)} numbers; it takes four: left, top, "
                    "right, bottom"
                )
            left, top, right, bottom = self.crop_box
            if not (0 <= left < right and 0 <= top < bottom):
                raise ValueError(
                    f"data.crop_box is {list(self.crop_box)}; it takes left < right and "
                    "top < bottom, none negative"
                )

    @property
    def stored_size(self) -> Size:
        """Of the prepared images: the model's input without its zero border."""
        height, width = height_width(self.image_size)
        return plain_size((height - 2 * self.pad, width - 2 * self.pad))

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the prepared images."""
        return (*height_width(self.stored_size), self.channels)

    @property
    def stored_type(self) -> str:
        """numpy's name of the prepared pixels' type: uint8, uint16 beyond 8 bits, or float32."""
        if self.floats:
            return "<f4"
        return "|u1" if self.bits <= 8 else "<u2"

    @property
    def stored_bits(self) -> int:
        """Bits of a prepared level: those of a byte, of which a batch keeps `bits`, or `bits`."""
        return max(self.bits, 8)


CONFIG_FOLDER = CONFIGS / "data"
FOLDER = "folder"
"""The data set of the user's own pictures."""

OPTIONS = (
    *("root", "source", "cache", "format", "image_size", "channels", "bits", "floats"),
    *("value_range", "crop", "crop_box", "resize", "labels", "image_key", "label_key"),
    *("train_size", "valid_size", "test_size"),
)
"""Settings that the preparing command takes; `--size` is `image_size`."""


def is_known(name: str) -> bool:
    """Whether a name is that of a file in `configs/data`."""
    is_name = re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name)
    return bool(is_name) and (CONFIG_FOLDER / f"{name}.yaml").is_file()


def config_names() -> list[str]:
    """Data sets that have a file in `configs/data` and need preparation.

    Raises:
        DataError: One of the files is bad.
    """
    names = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml") if is_known(path.stem))
    return [name for name in names if load_config(name).format not in IN_MEMORY_FORMATS]


def load_config(name: str) -> DataConfig:
    """`configs/data/NAME.yaml` as a `DataConfig`.

    Raises:
        DataError: No such name, or a file that does not fit `DataConfig`.
    """
    path = CONFIG_FOLDER / f"{name}.yaml"
    if not is_known(name):
        raise DataError(f"there is no data set {name!r} in {CONFIG_FOLDER}")
    try:
        values = read_yaml(path, 1 << 20)
        if not isinstance(values, dict):
            raise ValueError("it holds no settings")
        if unknown := {str(key) for key in values} - {f.name for f in fields(DataConfig)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return DataConfig(**values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not valid: {error}") from error


def prepare_command(config: DataConfig) -> str:
    """The command that prepares a data set, to be typed as it is."""
    name = config.name if is_known(config.name) else FOLDER
    usual = load_config(name) if is_known(name) else None
    words: list[object] = ["python", "-m", "nvae.data.prepare", name]
    for setting in OPTIONS:
        value = getattr(config, setting)
        if value is not None and value != getattr(usual, setting, None):
            words += _option(setting, value)
    return shell(*words)


def _typed(value: object) -> str:
    """A value as one types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option(setting: str, value: Any) -> list[object]:
    """A setting as the preparing command takes it."""
    if setting == "image_size":
        return ["--size", value if isinstance(value, int) else "x".join(map(str, value))]
    name = setting.replace("_", "-")
    if setting == "floats":
        return [f"--{'' if value else 'no-'}{name}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *value]
    return [f"--{name}", _typed(value)]
