"""The published checkpoints of VDVAE and Efficient-VDVAE, translated to this project's names.

A VDVAE file is a dictionary of weights, an Efficient-VDVAE file holds two of them, raw and
averaged. Neither holds hyper-parameters: those come from a preset of `configs/model`, or from the
authors' own settings as JSON, dictionary or cfg file.
"""

import ast
import configparser
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nvae.files import read_json
from nvae.models import EVDVAE, VDVAE, EVDVAEConfig, VDVAEConfig
from nvae.models.very_deep import VeryDeepConfig, VeryDeepVAE
from nvae.settings import CONFIGS, did_you_mean

Config = str | Path | Mapping[str, Any]
"""A preset's name, a JSON or cfg file, or the settings themselves."""

FAMILIES: dict[str, type[VeryDeepVAE]] = {"vdvae": VDVAE, "evdvae": EVDVAE}

ENTRIES = ("model_state_dict", "ema_model_state_dict")
"""Of an Efficient-VDVAE file, raw and averaged."""

_MARKS = {"vdvae": "encoder.in_conv.weight", "evdvae": "bottom_up.input_conv.weight"}
_PREFIX = "module."  # a VDVAE's raw weights are those of a wrapped model

_SAID_BY = {"vdvae": {"enc_blocks", "encoder_blocks"}, "evdvae": {"model", "up_strides"}}
"""Settings that only one family has, in its authors' spelling and in ours."""

_LARGEST_TEXT = 1 << 20
_LONGEST_LIST = 100_000


def family_of(checkpoint: Mapping[str, Any]) -> str | None:
    """``vdvae`` or ``evdvae`` where the file's contents look like that format."""
    if _MARKS["vdvae"] in checkpoint or _PREFIX + _MARKS["vdvae"] in checkpoint:
        return "vdvae"
    for entry in ENTRIES:
        weights = checkpoint.get(entry)
        if isinstance(weights, dict) and _MARKS["evdvae"] in weights:
            return "evdvae"
    return None


def translate_very_deep(
    checkpoint: Mapping[str, Any], family: str, weights: str, config: Config | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's configuration, as values, and its weights under our names.

    Args:
        checkpoint: contents of the file.
        family: see :func:`family_of`.
        weights: ``ema`` or ``raw``, of an Efficient-VDVAE.
        config: of the network; None: recognized by the weights' shapes.

    Raises:
        ValueError: the configuration is missing, impossible, or not that of the weights.
    """
    published = _weights_of(checkpoint, family, weights)
    if config is None:
        config = _recognize(published, family)
    settings = read_settings(config, family)
    cls = FAMILIES[family]
    if isinstance(settings, VDVAEConfig):
        _check_blocks(published, settings)
    if cls.least_tensors(settings) > len(published):
        raise ValueError(
            f"its {len(published)} weights are too few for {_title(config)}, which makes "
            f"{cls.least_tensors(settings)} or more"
        )
    with torch.device("meta"):
        model = cls(settings)
    names = published_names(model)
    for ours, like in model.state_dict().items():
        found = published.get(names[ours])
        if not isinstance(found, Tensor):
            raise ValueError(f"it lacks the weight {names[ours]!r} of {_title(config)}")
        if found.shape != like.shape:
            raise ValueError(
                f"its {names[ours]!r} has shape {tuple(found.shape)}, "
                f"{tuple(like.shape)} is expected of {_title(config)}"
            )
    surplus = sorted(map(str, published.keys() - set(names.values())))
    if surplus:
        raise ValueError(f"it has a weight that {_title(config)} lacks: {surplus[0]!r}")
    return settings.to_dict(), {ours: published[theirs] for ours, theirs in names.items()}


def _weights_of(checkpoint: Mapping[str, Any], family: str, weights: str) -> dict[str, Any]:
    if family == "vdvae":
        return {str(name).removeprefix(_PREFIX): value for name, value in checkpoint.items()}
    entry = ENTRIES[weights == "ema"]
    found = checkpoint.get(entry)
    if not isinstance(found, dict):
        raise ValueError(f"it has no {entry}; take weights={'raw' if weights == 'ema' else 'ema'}")
    return found


def published_names(model: VeryDeepVAE) -> dict[str, str]:
    """Every name of the model's state dict, with the published one."""
    translate = _vdvae_name if isinstance(model, VDVAE) else _evdvae_names(model)
    return {name: translate(name) for name in model.state_dict()}


_VDVAE_PARTS = (
    (r"^encoder\.stem\.", "encoder.in_conv."),
    (r"^encoder\.blocks\.", "encoder.enc_blocks."),
    (r"^initial_states\.", "decoder.bias_xs."),
    (r"^(gain|bias)$", r"decoder.\1"),
    (r"^image_head\.", "decoder.out_net.out_conv."),
    (r"^groups\.", "decoder.dec_blocks."),
    (r"\.posterior\.", ".enc."),
    (r"\.merge_latent\.", ".z_proj."),
    (r"\.cells\.", ".resnet."),
)


def _vdvae_name(name: str) -> str:
    for pattern, theirs in _VDVAE_PARTS:
        name = re.sub(pattern, theirs, name)
    return re.sub(r"convs\.(\d+)", lambda found: f"c{int(found[1]) + 1}", name)


_EVDVAE_PARTS = (
    (r"^encoder\.stem\.", "bottom_up.input_conv."),
    (r"^encoder\.levels\.(\d+)\.skip\.", r"bottom_up.levels_up_downsample.\1.skip_projection."),
    (r"^encoder\.levels\.(\d+)\.pool\.", r"bottom_up.levels_up_downsample.\1.pool.ops.0."),
    (r"^initial_state$", "top_down.trainable_h"),
    (r"^unpool\.(\d+)\.conv\.", r"top_down.levels_down_upsample.\1.unpool.ops.0."),
    (r"^unpool\.(\d+)\.", r"top_down.levels_down_upsample.\1.unpool."),
    (r"^image_head\.", "top_down.output_conv."),
    (r"\.cells\.", ".residual_block."),
    (r"\.(prior|posterior)\.", r".\1_net.0."),
    (r"\.(prior|posterior)_head\.", r".\1_layer.projection."),
    (r"\.merge_latent\.", ".z_projection."),
)


def _evdvae_names(model: VeryDeepVAE) -> Callable[[str], str]:
    assert isinstance(model, EVDVAE)
    level_of, plain = model.level_of, model.config.up_n_blocks_per_res

    def layer(found: re.Match[str]) -> str:
        index = int(found[1])
        level = level_of[index]
        position = index - level_of.index(level)
        if position == 0:
            return f"top_down.levels_down_upsample.{level}."
        return f"top_down.levels_down.{level}.{position - 1}."

    def block(found: re.Match[str]) -> str:
        level, position = int(found[1]), int(found[2])
        if position == plain[level]:
            return f"bottom_up.levels_up_downsample.{level}.residual_block."
        return f"bottom_up.levels_up.{level}.{position}.residual_block."

    def translate(name: str) -> str:
        name = re.sub(r"^groups\.(\d+)\.", layer, name)
        name = re.sub(r"^encoder\.levels\.(\d+)\.blocks\.(\d+)\.", block, name)
        for pattern, theirs in _EVDVAE_PARTS:
            name = re.sub(pattern, theirs, name)
        return re.sub(r"convs\.(\d+)", lambda found: f"convs.{2 * int(found[1]) + 1}", name)

    return translate


def _count(published: Mapping[str, Any], part: str) -> int:
    pattern = re.compile(rf"{re.escape(part)}\.(\d+)\.")
    return len({found[1] for name in published if (found := pattern.match(str(name)))})


def _check_blocks(published: Mapping[str, Any], config: VDVAEConfig) -> None:
    for part, setting, plan in (
        ("encoder.enc_blocks", "encoder_blocks", config.encoder_plan),
        ("decoder.dec_blocks", "decoder_blocks", config.decoder_plan),
    ):
        found = _count(published, part)
        if found != len(plan):
            raise ValueError(
                f"it has {found} {setting.replace('_', ' ')}, but the configuration's "
                f"{setting} make {len(plan)}"
            )


def _recognize(published: Mapping[str, Any], family: str) -> str:
    """The preset of a VDVAE's weights.

    Raises:
        ValueError: none fits, or the family's settings cannot be read off shapes.
    """
    names = presets(family)
    give = (
        "give config=, of the commands settings=: a file with its settings or a preset: "
        f"{', '.join(names)}"
    )
    if family == "evdvae":
        raise ValueError(f"shapes do not say all settings of an Efficient-VDVAE; {give}")

    def shape(name: str) -> tuple[int, ...] | None:
        found = published.get(name)
        return tuple(found.shape) if isinstance(found, Tensor) else None

    for name in names:
        config = read_settings(name, family)
        assert isinstance(config, VDVAEConfig)
        states = {
            f"decoder.bias_xs.{i}": (1, config.width_at(side), side, side)
            for i, side in enumerate(config.learned_states)
        }
        head = config.pixel_distribution.logit_channels(config)
        if (
            shape("encoder.in_conv.weight") == (config.width, config.image_channels, 3, 3)
            and shape("decoder.out_net.out_conv.weight") == (head, config.width, 1, 1)
            and _count(published, "encoder.enc_blocks") == len(config.encoder_plan)
            and _count(published, "decoder.dec_blocks") == len(config.decoder_plan)
            and all(shape(key) == expected for key, expected in states.items())
        ):
            return name
    raise ValueError(f"its shapes are those of no preset; {give}")


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
                f"{_title(config)} are settings of {other}, the checkpoint is a {family}"
            )
    cls = FAMILIES[family].config_class
    if "enc_blocks" in values:
        values = _from_vdvae(values)
    elif "model" in values and isinstance(values["model"], Mapping):
        values = _from_evdvae(values)
    found = cls.from_dict({"normalized": False, **values})
    assert isinstance(found, VeryDeepConfig)
    return found


def _title(config: Config) -> str:
    return "the settings given" if isinstance(config, Mapping) else str(config)


def _values(config: Config, family: str) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
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


_VDVAE_PIXELS = {
    "cifar10": (120.63838, 64.16736), "imagenet32": (116.2373, 69.37404),
    "imagenet64": (115.92961967, 69.37404), "ffhq_256": (112.8666757481, 69.84780273),
    "ffhq_1024": (255 * 0.4387, 255 * 0.2743),
}  # fmt: skip
"""Mean and standard deviation of a data set's pixels, as the authors have them."""

_VDVAE_NAMES = {
    "image_size": "image_size", "image_channels": "image_channels", "width": "width",
    "custom_width_str": "custom_widths", "zdim": "latent_channels",
    "enc_blocks": "encoder_blocks", "dec_blocks": "decoder_blocks",
    "bottleneck_multiple": "bottleneck_multiple", "no_bias_above": "no_bias_above",
    "num_mixtures": "num_mixtures",
}  # fmt: skip


def _from_vdvae(theirs: Mapping[str, Any]) -> dict[str, Any]:
    values = {ours: theirs[name] for name, ours in _VDVAE_NAMES.items() if name in theirs}
    values["custom_widths"] = values.get("custom_widths") or ""
    dataset = str(theirs.get("dataset"))
    if theirs.get("low_bit", dataset == "ffhq_256"):
        values["bits"] = 5
    if "input_shift" in theirs and "input_scale" in theirs:
        shift, scale = theirs["input_shift"], theirs["input_scale"]
        if not all(isinstance(each, int | float) for each in (shift, scale)) or not scale:
            raise ValueError(f"input_shift={shift!r} and input_scale={scale!r} are no numbers")
        unit = 255 if dataset == "ffhq_1024" else 1
        values |= {"pixel_mean": -shift * unit, "pixel_std": unit / scale}
    elif dataset in _VDVAE_PIXELS:
        values["pixel_mean"], values["pixel_std"] = _VDVAE_PIXELS[dataset]
    else:
        raise ValueError(
            "the settings give neither input_shift and input_scale nor a dataset of "
            f"{', '.join(_VDVAE_PIXELS)}"
        )
    return values


_EVDVAE_OPTIONS = {
    *("input_kernel_size", "output_kernel_size", "use_1x1_conv", "stable_init"),
    *("initialize_prior_weights_as_zero", "distribution_base", "gradient_smoothing_beta"),
    *("use_residual_distribution", "output_distribution_base", "output_gradient_smoothing_beta"),
}


def _from_evdvae(theirs: Mapping[str, Any]) -> dict[str, Any]:
    data, model, loss = (theirs.get(section, {}) for section in ("data", "model", "loss"))
    if not all(isinstance(section, Mapping) for section in (data, model, loss)):
        raise ValueError("data, model and loss must be groups of settings")
    try:
        values = {
            "image_size": data["target_res"],
            "image_channels": data["channels"],
            "bits": int(data.get("num_bits", 8)),
            "num_mixtures": model.get("num_output_mixtures", 10),
        }
        required = {name for name in EVDVAEConfig.bounds() if name.startswith(("up_", "down_"))}
        for name in sorted(required | {"input_conv_filters"}):
            values[name] = model[name]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings lack or spoil {error}") from None
    for name in _EVDVAE_OPTIONS & model.keys():
        values[name] = model[name]
    for name in ("input_kernel_size", "output_kernel_size"):
        sides = values.get(name, 1)
        if isinstance(sides, list | tuple):
            if len(set(sides)) != 1:
                raise ValueError(f"{name}={sides} is no square")
            values[name] = sides[0]
    if "min_mol_logscale" in loss:
        values["min_mol_logscale"] = loss["min_mol_logscale"]
    if data.get("dataset_source") == "binarized_mnist":
        values |= {"likelihood": "bernoulli", "bits": 1, "counted_size": 28}
    return values


def _read_cfg(path: Path) -> dict[str, Any]:
    """Sections of an INI file whose values are Python literals, with + and * of lists."""
    if path.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"{path} has more than {_LARGEST_TEXT} bytes")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        return {
            section: {key: _value(text) for key, text in parser[section].items()}
            for section in parser.sections()
        }
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no cfg file: {str(error).splitlines()[0]}") from None


def _value(text: str) -> Any:
    """A value of a cfg file; nothing is run. What is no expression is text."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
    try:
        return _literal(tree)
    except (TypeError, RecursionError):
        return text


def _literal(node: ast.AST) -> Any:
    """The value of literals, lists, tuples, ``+`` and ``*``; a TypeError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _literal(node.left), _literal(node.right)
        if isinstance(node.op, ast.Add):
            _check_length(_length(left) + _length(right))
            return left + right
        _check_length(_length(left) * right if isinstance(right, int) else 0)
        _check_length(_length(right) * left if isinstance(left, int) else 0)
        return left * right
    raise TypeError("no literal")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | str) else 0


def _check_length(length: int) -> None:
    if length > _LONGEST_LIST:
        raise ValueError(f"a list of {length} entries is too long")
