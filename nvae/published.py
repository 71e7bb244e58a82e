"""The published checkpoint format, translated to this project's names.

Its modules are numbered in order of execution: `pre_process.0`, `enc_tower.0` and so on. The
translation is a list of name pairs made from the configuration alone; tensors are only moved.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nvae.models.cells import Cell, MobileConv
from nvae.models.config import ModelConfig
from nvae.models.latent_group import LatentGroup
from nvae.models.layers import FactorizedSkip, UpsampleSkip
from nvae.models.nvae import NVAE

_EARLY_DEFAULTS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}


# The format knows of its images nothing but the data set's name: size and channels, and where
# fewer pixels count (these are the black and white ones), the side of the window that does.
_IMAGES: dict[str, tuple[int, int]] = {
    "mnist": (32, 1), "omniglot": (32, 1), "stacked_mnist": (64, 3), "cifar10": (32, 3),
    "celeba_64": (64, 3), "celeba_256": (256, 3), "imagenet_32": (32, 3), "imagenet_64": (64, 3),
    "ffhq": (256, 3), "lsun_bedroom_128": (128, 3), "lsun_bedroom_256": (256, 3),
    "lsun_church_64": (64, 3), "lsun_church_128": (128, 3), "lsun_tower_64": (64, 3),
}  # fmt: skip
_COUNTED = {"mnist": 28, "omniglot": 28}


def is_published(checkpoint: dict[str, Any]) -> bool:
    """Whether the file's contents look like the published format."""
    return isinstance(checkpoint.get("args"), Namespace) and "state_dict" in checkpoint


def model_config(args: Namespace) -> ModelConfig:
    """The configuration that the stored arguments describe.

    Raises:
        ValueError: for an argument that is missing or a data set that the format does not know.
    """
    values = {**_EARLY_DEFAULTS, **vars(args)}
    try:
        dataset = values["dataset"]
        if dataset not in _IMAGES:
            known = ", ".join(sorted(_IMAGES))
            raise ValueError(f"the checkpoint's data set {dataset!r} is unknown; known: {known}")
        image_size, image_channels = _IMAGES[dataset]
        blocks, out_blocks = values["num_preprocess_blocks"], values["num_postprocess_blocks"]
        if blocks != out_blocks:
            raise ValueError(f"the checkpoint halves {blocks} times but doubles {out_blocks} times")
        if dataset in _COUNTED:
            likelihood = "bernoulli"
        else:
            likelihood = "normal" if values["num_mixture_dec"] == 1 else "logistic_mixture"
        return ModelConfig(
            image_size=image_size,
            image_channels=image_channels,
            counted_size=_COUNTED.get(dataset),
            bits=values["num_x_bits"],
            likelihood=likelihood,
            num_mixtures=values["num_mixture_dec"],
            num_scales=values["num_latent_scales"],
            groups_per_scale=values["num_groups_per_scale"],
            adaptive_groups=bool(values["ada_groups"]),
            min_groups_per_scale=values["min_groups_per_scale"],
            latent_channels=values["num_latent_per_group"],
            encoder_channels=values["num_channels_enc"],
            decoder_channels=values["num_channels_dec"],
            preprocess_blocks=blocks,
            preprocess_cells=values["num_preprocess_cells"],
            postprocess_cells=values["num_postprocess_cells"],
            encoder_cells_per_group=values["num_cell_per_cond_enc"],
            decoder_cells_per_group=values["num_cell_per_cond_dec"],
            cell_family=values["arch_instance"],
            squeeze_excitation=bool(values["use_se"]),
            residual_distributions=bool(values["res_dist"]),
            num_flows=values["num_nf"],
        )
    except KeyError as missing:
        raise ValueError(f"the checkpoint's arguments lack {missing}") from None


def translate_published(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published checkpoint's configuration, as values, and its weights under our names.

    Raises:
        ValueError: if arguments and weights do not fit together.
    """
    published = checkpoint["state_dict"]
    config = model_config(checkpoint["args"])
    if NVAE.least_tensors(config) > len(published):
        raise ValueError(f"the checkpoint's {len(published)} weights are too few for its arguments")
    with torch.device("meta"):
        model = NVAE(config)
    shapes = {name: like.shape for name, like in model.state_dict().items()}
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for target, sources in name_pairs(model):
        for name in sources:
            if not isinstance(published.get(name), Tensor):
                raise ValueError(f"the checkpoint lacks the weight {name!r}")
        used.update(sources)
        parts = [published[name] for name in sources]
        if sum(part.numel() for part in parts) != shapes[target].numel():
            raise ValueError(
                f"the checkpoint's {sources[0]!r} has shape {tuple(parts[0].shape)}, "
                f"{tuple(shapes[target])} is expected"
            )
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        ours[target] = tensor.reshape(shapes[target])
    unknown = [n for n in published if n not in used and not _is_redundant(n)]
    if unknown:
        raise ValueError(f"the checkpoint has a weight this model lacks: {unknown[0]!r}")
    for name in shapes:
        if name.endswith(".initialized"):
            ours[name] = torch.tensor(True)
    return config.to_dict(), ours


def _is_redundant(name: Any) -> bool:
    """Stored in the format but not part of the model's state.

    Mobile convolutions appear twice; a vanilla model stores a constant that it does not use.
    """
    return str(name).endswith(".weight_normalized") or name == "prior_ftr0"


NamePair = tuple[str, list[str]]


def name_pairs(model: NVAE) -> Iterator[NamePair]:
    """Every entry of our state dict with the published entries it is made of."""
    encoder = model.encoder
    yield from _conv("encoder.stem", "stem")
    for i, cell in enumerate(encoder.preprocess):
        yield from _cell(cell, f"encoder.preprocess.{i}", f"pre_process.{i}")

    # cells and combiners of a tower are numbered together, in order of execution
    last = len(encoder.groups) - 1
    position, down = 0, 0
    combiner_positions: list[int] = []
    for g, cells in enumerate(encoder.groups):
        assert isinstance(cells, nn.Sequential)
        if g in encoder.downsample_before:
            cell = encoder.downsample[down]
            yield from _cell(cell, f"encoder.downsample.{down}", f"enc_tower.{position}")
            down, position = down + 1, position + 1
        for i, cell in enumerate(cells):
            yield from _cell(cell, f"encoder.groups.{g}.{i}", f"enc_tower.{position}")
            position += 1
        if g < last:
            combiner_positions.append(position)
            position += 1
    yield from _conv("encoder.top.1", "enc0.1")
    yield from _top_down(model, combiner_positions[::-1])
    for i, cell in enumerate(model.postprocess):
        yield from _cell(cell, f"postprocess.{i}", f"post_process.{i}")
    yield from _conv("image_head.1", "image_conditional.1")


def _top_down(model: NVAE, encoder_combiners: list[int]) -> Iterator[NamePair]:
    if len(model.groups) > 1:
        yield "initial_state", ["prior_ftr0"]
    position, up = 0, 0
    num_flows = model.config.num_flows
    for g, group in enumerate(model.groups):
        assert isinstance(group, LatentGroup)
        ours = f"groups.{g}"
        if g in model.upsample_before:
            yield from _cell(model.upsample[up], f"upsample.{up}", f"dec_tower.{position}")
            up, position = up + 1, position + 1
        for i, cell in enumerate(group.cells):
            yield from _cell(cell, f"{ours}.cells.{i}", f"dec_tower.{position}")
            position += 1
        if g > 0:
            yield from _conv(f"{ours}.prior.conv", f"dec_sampler.{g - 1}.1")
            yield from _conv(f"{ours}.merge_encoder", f"enc_tower.{encoder_combiners[g - 1]}.conv")
        yield from _conv(f"{ours}.posterior.conv", f"enc_sampler.{g}")
        for step in range(2 * num_flows):
            theirs = f"nf_cells.{g * num_flows + step // 2}.cell{step % 2 + 1}"
            flow = f"{ours}.flow.{step}"
            yield from _conv(f"{flow}.widen", f"{theirs}.conv.convz.0", bias=False)
            yield from _conv(f"{flow}.spatial", f"{theirs}.conv.convz.2", bias=False)
            yield from _conv(f"{flow}.mean", f"{theirs}.mu.conv_0")
        if group.vanilla:
            yield from _conv(f"{ours}.merge_latent", "stem_decoder")
        else:
            yield from _conv(f"{ours}.merge_latent", f"dec_tower.{position}.conv")
            position += 1


def _conv(ours: str, theirs: str, bias: bool = True) -> Iterator[NamePair]:
    yield f"{ours}.weight", [f"{theirs}.weight"]
    yield f"{ours}.log_gain", [f"{theirs}.log_weight_norm"]
    if bias:
        yield f"{ours}.bias", [f"{theirs}.bias"]


def _norm(ours: str, theirs: str) -> Iterator[NamePair]:
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield f"{ours}.{name}", [f"{theirs}.{name}"]


def _cell(cell: nn.Module, ours: str, theirs: str) -> Iterator[NamePair]:
    assert isinstance(cell, Cell)
    if isinstance(cell.skip, FactorizedSkip):
        quarters = [f"{theirs}.skip.conv_{n}" for n in (1, 2, 3, 4)]
        for our_name, their_name in (
            ("weight", "weight"), ("log_gain", "log_weight_norm"), ("bias", "bias"),
        ):  # fmt: skip
            yield f"{ours}.skip.{our_name}", [f"{quarter}.{their_name}" for quarter in quarters]
    elif isinstance(cell.skip, UpsampleSkip):
        yield from _conv(f"{ours}.skip.conv", f"{theirs}.skip.1", bias=False)
    for j, op in enumerate(cell.branch):
        if isinstance(op, MobileConv):
            yield from _mobile(f"{ours}.branch.{j}", f"{theirs}._ops.{j}.conv", int(op.upsample))
        else:
            yield from _act_conv(cell, j, f"{ours}.branch.{j}", f"{theirs}._ops.{j}")
    if cell.attention is not None:
        for our_name, index in (("reduce", 0), ("expand", 2)):
            for name in ("weight", "bias"):
                yield f"{ours}.attention.{our_name}.{name}", [f"{theirs}.se.se.{index}.{name}"]


def _act_conv(cell: Cell, j: int, ours: str, theirs: str) -> Iterator[NamePair]:
    norm = getattr(cell.branch[j], "norm", None)
    if norm is not None and hasattr(norm, "running_mean"):
        fused = norm.activation == "swish"
        yield from _norm(f"{ours}.norm", f"{theirs}.{'bn_act' if fused else 'bn.bn'}")
    yield from _conv(f"{ours}.conv", f"{theirs}.conv_0")


def _mobile(ours: str, theirs: str, shift: int) -> Iterator[NamePair]:
    yield from _norm(f"{ours}.norm_in", f"{theirs}.{shift}.bn")
    yield f"{ours}.expand.weight", [f"{theirs}.{shift + 1}.conv.0.weight"]
    yield from _norm(f"{ours}.norm_expand", f"{theirs}.{shift + 1}.conv.1")
    yield f"{ours}.spatial.weight", [f"{theirs}.{shift + 2}.conv.0.weight"]
    yield from _norm(f"{ours}.norm_spatial", f"{theirs}.{shift + 2}.conv.1")
    yield f"{ours}.project.weight", [f"{theirs}.{shift + 3}.weight"]
    yield from _norm(f"{ours}.norm_out", f"{theirs}.{shift + 4}.bn")
