"""The settings of published VDVAEs and Efficient-VDVAEs, whose weight files hold none.

They come from a preset of `configs/model`, from the authors' own settings as JSON, dictionary or
cfg file, or from :meth:`ImageConfig.to_dict`.
"""

import ast
import configparser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nvae.files import read_bytes, read_json
from nvae.models import EVDVAE, VDVAE, EVDVAEConfig
from nvae.models.very_deep import VeryDeepConfig, VeryDeepVAE
from nvae.settings import CONFIGS, check_value, did_you_mean

Config = str | Path | Mapping[str, Any]
"""A preset's name, a JSON or cfg file, or the settings themselves."""

FAMILIES: dict[str, type[VeryDeepVAE]] = {"vdvae": VDVAE, "evdvae": EVDVAE}

_SAID_BY = {"vdvae": {"enc_blocks", "encoder_blocks"}, "evdvae": {"model", "up_strides"}}
"""Settings that only one family has, in its authors' spelling and in ours."""

_LARGEST_TEXT = 1 << 20
_MOST_ENTRIES = 100_000
"""That the sums and products of a cfg file may make."""


def presets(family: str) -> list[str]:
    """Names in `configs/model` that are networks of a family."""
    return sorted(path.stem for path in (CONFIGS / "model").glob(f"{family}_*.yaml"))


def read_settings(config: Config, family: str) -> VeryDeepConfig:
    """The configuration that a preset, a file or a dictionary describes.

    The likelihood is the published one unless it says ``normalized``.

    Raises:
        ValueError: no such preset or file, or settings that are missing or impossible.
    """
    values = _values(config, family)
    for other, keys in _SAID_BY.items():
        if other != family and keys & values.keys() and not _SAID_BY[family] & values.keys():
            raise ValueError(
                f"{settings_title(config)} are settings of {other}, the checkpoint is a {family}"
            )
    try:
        if _VDVAE_SPELLING & values.keys():
            values = _from_vdvae(values)
        elif any(isinstance(values.get(section), Mapping) for section in _EVDVAE_SECTIONS):
            values = _from_evdvae(values)
        found = FAMILIES[family].config_class.from_dict({"normalized": False, **values})
    except ValueError as error:
        raise ValueError(f"{settings_title(config)}: {error}") from None
    assert isinstance(found, VeryDeepConfig)
    return found


def settings_title(config: Config) -> str:
    """What messages call them."""
    return "the settings given" if isinstance(config, Mapping) else str(config)


def _values(config: Config, family: str) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | Path):
        raise ValueError(f"{config!r} is no preset, no file and no dictionary of settings")
    path = Path(config)
    if path.suffix in (".json", ".cfg"):
        if not path.is_file():
            raise ValueError(f"there is no {path}")
        values = read_json(path) if path.suffix == ".json" else _read_cfg(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} is no JSON object")
        return values
    names = presets(family)
    # the authors' own spelling will do: celebA64_baseline
    name = f"{family}_{str(config).lower().removeprefix(f'{family}_')}"
    if name not in names:
        raise ValueError(
            f"{config} is no preset of {family}{did_you_mean(name, names)} and no "
            f"JSON or cfg file; presets: {', '.join(names)}"
        )
    return preset_settings(name)


def preset_settings(name: str) -> dict[str, Any]:
    """The model's settings in a file of `configs/model` and in those that it builds on."""
    content = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    values: dict[str, Any] = {}
    for base in content.get("defaults", []):
        if isinstance(base, str) and "@" not in base and base != "_self_":
            values |= preset_settings(base)
    own = content.get("model", {})
    # what follows the data set has no value here, and the likelihood is the file's
    follows = {key for key, value in own.items() if isinstance(value, str) and "${" in value}
    return values | {key: own[key] for key in own.keys() - follows - {"normalized"}}


_VDVAE_DATA = {
    "cifar10": (32, 120.63838, 64.16736), "imagenet32": (32, 116.2373, 69.37404),
    "imagenet64": (64, 115.92961967, 69.37404), "ffhq_256": (256, 112.8666757481, 69.84780273),
    "ffhq_1024": (1024, 255 * 0.4387, 255 * 0.2743),
}  # fmt: skip
"""Size of a data set's images, and mean and standard deviation of its pixels."""

_VDVAE_NAMES = {
    "image_size": "image_size", "image_channels": "image_channels", "width": "width",
    "custom_width_str": "custom_widths", "zdim": "latent_channels",
    "enc_blocks": "encoder_blocks", "dec_blocks": "decoder_blocks",
    "bottleneck_multiple": "bottleneck_multiple", "no_bias_above": "no_bias_above",
    "num_mixtures": "num_mixtures",
}  # fmt: skip
_VDVAE_SPELLING = {theirs for theirs, ours in _VDVAE_NAMES.items() if theirs != ours}


def _from_vdvae(theirs: Mapping[str, Any]) -> dict[str, Any]:
    values = {ours: theirs[name] for name, ours in _VDVAE_NAMES.items() if name in theirs}
    values["custom_widths"] = values.get("custom_widths") or ""
    dataset = str(theirs.get("dataset"))
    size, mean, std = _VDVAE_DATA.get(dataset, (None, None, None))
    values.setdefault("image_size", size)
    for name in ("enc_blocks", "dec_blocks", "image_size"):  # the rest has the authors' defaults
        if values.get(_VDVAE_NAMES[name]) is None:
            raise ValueError(f"{name} is missing")
    if {"low_bit", "dataset"}.isdisjoint(theirs):
        raise ValueError("low_bit is missing: whether the likelihood has 5 bits")
    low_bit = theirs.get("low_bit", dataset == "ffhq_256")
    check_value("low_bit", low_bit, bool)
    if low_bit:
        values["bits"] = 5
    if "input_shift" in theirs and "input_scale" in theirs:
        shift, scale = theirs["input_shift"], theirs["input_scale"]
        check_value("input_shift", shift, float)
        check_value("input_scale", scale, float, (1e-6, None))
        unit = 255 if dataset == "ffhq_1024" else 1
        mean, std = -shift * unit, unit / scale
    if mean is None or std is None:
        raise ValueError(
            f"neither input_shift and input_scale nor a dataset of {', '.join(_VDVAE_DATA)}"
        )
    return values | {"pixel_mean": mean, "pixel_std": std}


_EVDVAE_SECTIONS = ("data", "model", "loss")
_EVDVAE_SCALES = (
    *("distribution_base", "gradient_smoothing_beta", "use_residual_distribution"),
    *("output_distribution_base", "output_gradient_smoothing_beta"),
)
"""What no shape says, and every number depends on."""

_EVDVAE_OPTIONS = {
    *("input_kernel_size", "output_kernel_size", "use_1x1_conv", "stable_init"),
    "initialize_prior_weights_as_zero",
}


def _from_evdvae(theirs: Mapping[str, Any]) -> dict[str, Any]:
    sections = {name: theirs.get(name, {}) for name in _EVDVAE_SECTIONS}
    if not all(isinstance(section, Mapping) for section in sections.values()):
        raise ValueError("data, model and loss must be groups of settings")

    def given(section: str, name: str) -> Any:
        if name not in sections[section]:
            raise ValueError(f"{section}.{name} is missing")
        return sections[section][name]

    model, bits = sections["model"], given("data", "num_bits")
    values = {
        "image_size": given("data", "target_res"),
        "image_channels": given("data", "channels"),
        # 8.0 in their files
        "bits": int(bits) if isinstance(bits, float) and bits.is_integer() else bits,
        "num_mixtures": model.get("num_output_mixtures", 10),
        "min_mol_logscale": given("loss", "min_mol_logscale"),
    }
    lists = (name for name in EVDVAEConfig.bounds() if name.startswith(("up_", "down_")))
    for name in ("input_conv_filters", *lists, *_EVDVAE_SCALES):
        values[name] = given("model", name)
    values |= {name: model[name] for name in _EVDVAE_OPTIONS & model.keys()}
    for name in ("input_kernel_size", "output_kernel_size"):
        sides = values.get(name, 1)
        if isinstance(sides, list | tuple):
            if not sides or any(side != sides[0] for side in sides):
                raise ValueError(f"model.{name}={sides} is no square")
            values[name] = sides[0]
    if sections["data"].get("dataset_source") == "binarized_mnist":
        values |= {"likelihood": "bernoulli", "bits": 1, "counted_size": 28}
    return values


def _read_cfg(path: Path) -> dict[str, Any]:
    """Sections of an INI file whose values are Python literals, with + and * of lists."""
    parser, literals = configparser.ConfigParser(interpolation=None), _Literals()
    content = read_bytes(path, _LARGEST_TEXT)
    try:
        parser.read_string(content.decode())
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no cfg file: {str(error).splitlines()[0]}") from None
    return {
        section: {key: literals.value(text) for key, text in parser[section].items()}
        for section in parser.sections()
    }


class _Literals:
    """Values of a cfg file's texts. Nothing is run, and what they may grow to is bounded."""

    def __init__(self) -> None:
        self.left = _MOST_ENTRIES

    def value(self, text: str) -> Any:
        """Of literals, lists, tuples, ``+`` and ``*``; what is none of these is text."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return text
        try:
            return self._of(tree)
        except (TypeError, RecursionError):
            return text

    def _of(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self._of(each) for each in node.elts]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._of(node.operand)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = self._of(node.left), self._of(node.right)
            if isinstance(node.op, ast.Add):
                self._take(_length(left) + _length(right))
                return left + right
            for several, times in ((left, right), (right, left)):
                if isinstance(several, list) and any(isinstance(each, list) for each in several):
                    raise TypeError("lists of lists are not repeated")
                self._take(_length(several) * times if isinstance(times, int) else 0)
            return left * right
        raise TypeError("no literal")

    def _take(self, entries: int) -> None:
        self.left -= max(0, entries)
        if self.left < 0:
            raise ValueError(f"its lists have more than {_MOST_ENTRIES} entries, which is too long")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | str) else 0
