"""The published checkpoints of VDVAE and Efficient-VDVAE, translated to this project's names.

A VDVAE file is a dictionary of weights, an Efficient-VDVAE file holds two of them, raw and
averaged. Neither holds hyper-parameters: those come from a preset of `configs/model`, or from the
authors' own settings as JSON, dictionary or cfg file.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nvae.models import EVDVAE, VDVAE, EVDVAEConfig, VDVAEConfig
from nvae.models.very_deep import VeryDeepConfig, VeryDeepVAE
from nvae.published_settings import FAMILIES, Config, presets, read_settings, settings_title
from nvae.settings import height_width

ENTRIES = ("model_state_dict", "ema_model_state_dict")
"""Of an Efficient-VDVAE file, raw and averaged."""

_MARKS = {"vdvae": "encoder.in_conv.weight", "evdvae": "bottom_up.input_conv.weight"}
_PREFIX = "module."  # a VDVAE's raw weights are those of a wrapped model


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
            f"its {len(published)} weights are too few for {settings_title(config)}, which makes "
            f"{cls.least_tensors(settings)} or more"
        )
    with torch.device("meta"):
        model = cls(settings)
    names = published_names(model)
    for ours, like in model.state_dict().items():
        found = published.get(names[ours])
        if not isinstance(found, Tensor):
            raise ValueError(f"it lacks the weight {names[ours]!r} of {settings_title(config)}")
        if found.shape != like.shape:
            raise ValueError(
                f"its {names[ours]!r} has shape {tuple(found.shape)}, "
                f"{tuple(like.shape)} is expected of {settings_title(config)}"
            )
    surplus = sorted(map(str, published.keys() - set(names.values())))
    if surplus:
        raise ValueError(f"it has a weight that {settings_title(config)} lacks: {surplus[0]!r}")
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
    fits = _fits_vdvae if family == "vdvae" else _fits_evdvae
    names = [name for name in presets(family) if fits(published, read_settings(name, family))]
    if family == "vdvae" and names:
        return names[0]
    give = "give config=, of the commands settings=: a file with its settings or a preset"
    if family == "evdvae":
        theirs = f"the shapes are those of {' and '.join(names) or 'none'}"
        raise ValueError(f"shapes do not say all settings of an Efficient-VDVAE; {give}; {theirs}")
    raise ValueError(f"its shapes are those of no preset; {give}: {', '.join(presets(family))}")


def _shape(published: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    found = published.get(name)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def _fits_vdvae(published: Mapping[str, Any], config: VeryDeepConfig) -> bool:
    assert isinstance(config, VDVAEConfig)
    head = config.pixel_distribution.logit_channels(config)
    shapes = {
        "encoder.in_conv.weight": (config.width, config.image_channels, 3, 3),
        "decoder.out_net.out_conv.weight": (head, config.width, 1, 1),
    }
    for i, side in enumerate(config.learned_states):
        shapes[f"decoder.bias_xs.{i}"] = (1, config.width_at(side), side, side)
    return (
        _count(published, "encoder.enc_blocks") == len(config.encoder_plan)
        and _count(published, "decoder.dec_blocks") == len(config.decoder_plan)
        and all(_shape(published, name) == shape for name, shape in shapes.items())
    )


def _fits_evdvae(published: Mapping[str, Any], config: VeryDeepConfig) -> bool:
    assert isinstance(config, EVDVAEConfig)
    head = config.pixel_distribution.logit_channels(config)
    shapes: dict[str, tuple[int, ...]] = {
        "bottom_up.input_conv.weight": (config.input_conv_filters, config.image_channels, 1, 1),
        "top_down.output_conv.weight": (head, config.down_filters[-1], 1, 1),
    }
    side = height_width(config.image_size)[0] // math.prod(config.down_strides)
    for level, (width, stride) in enumerate(
        zip(config.down_filters, config.down_strides, strict=True)
    ):
        side *= stride
        if stride > 1:
            name = f"top_down.levels_down_upsample.{level}.unpool.scale_bias"
            shapes[name] = (1, width, side, side)
    more = {m[0] for name in published if (m := re.match(r"top_down\.levels_down\.\d+\.\d+", name))}
    return (
        _count(published, "top_down.levels_down_upsample") == config.levels
        and len(more) == sum(config.down_n_blocks_per_res)
        and all(_shape(published, name) == shape for name, shape in shapes.items())
    )
