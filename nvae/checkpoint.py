"""Checkpoints: written atomically, read without running anything they contain.

One format serves training checkpoints and exported weights: a dictionary of plain types and
tensors, with the keys

- ``nvae_format``: 1,
- ``model``: the model's name in :data:`nvae.models.MODELS`; absent in older files: ``nvae``,
- ``model_config``: ``model.config.to_dict()``,
- ``run_config``: the configuration of the run that wrote it, or None,
- ``state_dict``: the network's entries prefixed ``model.``; averaged weights where the run kept
  an average, with the raw ones in ``current_model_state``,

beside whatever the trainer needs to resume. The published formats are read too (NVAE's, VDVAE's and
Efficient-VDVAE's), and so are exported folders of two plain files under the names that other
programs look for: `model.safetensors`, and `config.json`, the model's name and configuration with
the format's version and a checksum.
"""

import hashlib
import json
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from nvae.files import read_json, replacing, write_json
from nvae.models import MODELS, HierarchicalVAE, use_plugins
from nvae.published import is_published, translate_published
from nvae.published_settings import FAMILIES, Config
from nvae.published_very_deep import ENTRIES, family_of, translate_very_deep
from nvae.torch_file import TorchFileError, read_torch_file

FORMAT = 1
MODEL_PREFIX = "model."
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
Weights = Literal["ema", "raw"]
Format = Literal["nvae", "vdvae", "evdvae"]


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another format, or not to be trusted."""


def describe(model: HierarchicalVAE, run_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entries that make a training checkpoint readable by :func:`load_model`."""
    return {
        "nvae_format": FORMAT,
        "model": MODELS.name_of(type(model)),
        "model_config": model.config.to_dict(),
        "run_config": run_config,
    }


def save_model(
    model: HierarchicalVAE, path: str | Path, run_config: dict[str, Any] | None = None
) -> None:
    """Export the weights alone, atomically: ``path`` is either the old file or the whole new one.

    Raises:
        OSError: if the file cannot be written; an older file of that name is left as it was.
    """
    state = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    save_checkpoint({**describe(model, run_config), "state_dict": state}, path)


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint dictionary atomically; see :func:`save_model`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: str | Path, entries: Collection[str] | None = None) -> dict[str, Any]:
    """The dictionary of a checkpoint of this project or of the published format, on the CPU.

    Args:
        path: of the file.
        entries: keys wanted; None: all. Every byte that they need is compared with its checksum,
            which takes as long as reading it.

    Raises:
        CheckpointError: one line that says what is wrong with the file.
    """
    path = Path(path)
    if path.is_dir():
        best = (path / "checkpoints" / "best.ckpt", path / "best.ckpt")
        found = [f"; give {file}" for file in best if file.is_file()]
        raise CheckpointError(f"no checkpoint at {path}, which is a folder{''.join(found[:1])}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    if entries is not None:
        ours = ("nvae_format", "model", "model_config", "args", "state_dict")
        entries = {*ours, *ENTRIES, *entries}
    try:
        checkpoint = read_torch_file(path, entries)
        if not checkpoint:  # a published VDVAE is nothing but its weights
            checkpoint = read_torch_file(path)
    except TorchFileError as error:
        raise CheckpointError(str(error)) from None
    is_theirs = is_published(checkpoint) or family_of(checkpoint) is not None
    if not is_theirs and not _is_ours(checkpoint, path):
        raise CheckpointError(
            f"{path} holds neither a checkpoint of this project nor one of the published format"
        )
    for key, kind in (("state_dict", dict), ("model_config", dict), ("run_config", dict | None)):
        if not isinstance(checkpoint.get(key, {}), kind):
            raise CheckpointError(f"{path} is no usable checkpoint: its {key} is no dictionary")
    return checkpoint


def load_model(
    path: str | Path,
    weights: Weights = "ema",
    plugins: Iterable[str] = (),
    *,
    format: Format | None = None,
    config: Config | None = None,
) -> HierarchicalVAE:
    """The network of a checkpoint, in evaluation mode, on the CPU, channels_last.

    In float32; a VDVAE or Efficient-VDVAE whose file holds float64 stays in that.

    Args:
        path: a training checkpoint, exported weights, a checkpoint in a published format, or a
            folder that :mod:`nvae.export` wrote.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` never; most
            published files and folders hold one set.
        plugins: classes that the file may name although they are not ours, ``package.module:Class``
            each; see :func:`nvae.models.use_plugins`.
        format: published format that the file must have; None: whatever it has.
        config: of a published VDVAE or Efficient-VDVAE, whose files do not say it: the name of a
            preset in `configs/model`, the authors' settings as JSON, cfg file or dictionary, or
            :meth:`ImageConfig.to_dict`. The likelihood is then the published one, unless they say
            ``normalized``. None: one of the presets of VDVAE is recognized by its shapes.

    Raises:
        CheckpointError: if the file is missing, damaged, of another format, would run code, or
            if its weights do not fit its configuration or are not finite.
        ModuleNotFoundError: a folder, and safetensors is not installed.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; allowed: ema, raw")
    use_plugins(plugins)
    exported = is_weights_folder(path)
    raw = ["current_model_state"] if weights == "raw" else []
    checkpoint = {} if exported else load_checkpoint(path, raw)
    family = "nvae" if is_published(checkpoint) else family_of(checkpoint)
    _check_format(path, family, format, config)
    try:
        if family in FAMILIES:
            kind, (values, state) = family, translate_very_deep(checkpoint, family, weights, config)
        elif exported:
            kind, values, state = read_weights(path)
        elif family == "nvae":
            kind, (values, state) = "nvae", translate_published(checkpoint)
        else:
            kind, values = checkpoint.get("model", "nvae"), checkpoint["model_config"]
            state = _network_state(checkpoint, weights)
        model = _build(kind, values, state)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not describe a usable model: {detail}") from None
    # convolutions hand this layout on, whatever the input's; their kernels are faster in it
    return model.to(memory_format=torch.channels_last).eval()


def _check_format(
    path: str | Path, found: str | None, wanted: str | None, config: Config | None
) -> None:
    """Raise unless a file's published format is the one that was asked for."""
    formats = typing.get_args(Format)
    if wanted is not None and wanted not in formats:
        raise ValueError(f"format={wanted!r} is unknown; allowed: {', '.join(formats)}")
    if wanted is not None and wanted != found:
        held = f"format={found}" if found else "a format of this project, which takes no format="
        raise CheckpointError(f"{path} is no checkpoint of format={wanted}; it has {held}")
    if config is not None and found not in FAMILIES:
        raise CheckpointError(
            f"{path} says its settings itself; leave config=, of the commands settings=, out"
        )


def _network_state(checkpoint: dict[str, Any], weights: Weights) -> dict[str, Any]:
    state = checkpoint["state_dict"]
    if weights == "raw":
        state = checkpoint.get("current_model_state", state)
    return {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and name.startswith(MODEL_PREFIX)
    }


def _build(kind: str, values: dict[str, Any], state: Mapping[str, Any]) -> HierarchicalVAE:
    """The model with these weights, made only once it is known that they fit.

    Raises:
        ValueError: a weight is missing, unknown, of another shape, no tensor, or not finite.
    """
    MODELS.check_known(kind)
    cls = MODELS[kind]
    config = cls.config_class.from_dict(values)
    if cls.least_tensors(config) > len(state):
        raise ValueError(
            f"its configuration asks for {cls.least_tensors(config)} tensors or more, but it has "
            f"{len(state)}"
        )
    with torch.device("meta"):
        expected = cls(config).state_dict()
    for name, like in expected.items():
        found = state.get(name)
        if not isinstance(found, Tensor):
            raise ValueError(f"it lacks the weight {name!r}")
        if found.shape != like.shape:
            raise ValueError(
                f"its {name!r} has shape {tuple(found.shape)}, {tuple(like.shape)} is expected"
            )
        if like.is_floating_point() and not found.is_floating_point():
            raise ValueError(f"its {name!r} holds {found.dtype}, not numbers like {like.dtype}")
        if not found.isfinite().all():
            raise ValueError(f"its {name!r} holds numbers that are not finite")
    unknown = sorted(state.keys() - expected.keys())
    if unknown:
        raise ValueError(f"it has a weight that this model lacks: {unknown[0]!r}")
    model = cls(config)
    if kind in FAMILIES and all(tensor.dtype == torch.float64 for tensor in state.values()):
        model = model.double()  # nothing of what a file of theirs holds is rounded
    model.load_state_dict(state)
    return model


def _is_ours(checkpoint: dict[str, Any], path: Path) -> bool:
    version = checkpoint.get("nvae_format")
    if version is None:
        return False
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"{path} has format version {version}; this version of nvae reads {FORMAT}"
        )
    return {"model_config", "state_dict"} <= checkpoint.keys()


def write_weights(model: HierarchicalVAE, folder: Path) -> None:
    """Write a folder's two files, each of them atomically.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        OSError: a file cannot be written.
    """
    safetensors = _safetensors()
    # safetensors takes neither channels_last nor two names for one memory
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        try:
            safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk, and no OSError
            raise OSError(f"{WEIGHTS_FILE}: {error}") from None
    config = {"model": MODELS.name_of(type(model)), **model.config.to_dict()}
    checksum = _checksum(config, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, {"nvae_format": FORMAT, "sha256": checksum, **config})


def _checksum(config: dict[str, Any], weights: Path) -> str:
    """SHA-256, in hexadecimal, of a configuration and the file that it belongs to."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with weights.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def is_weights_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a configuration."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_weights(folder: str | Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The model's name, the values of its configuration, and its weights.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a file is missing, damaged, or of another format.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"the folder has no {name}")
    values = read_json(folder / CONFIG_FILE)
    if not isinstance(values, dict):
        raise ValueError(f"{CONFIG_FILE} is no JSON object")
    version, checksum = values.pop("nvae_format", None), values.pop("sha256", None)
    if type(version) is not int or version != FORMAT:
        raise ValueError(
            f"{CONFIG_FILE} has nvae_format {version}; this version of nvae reads {FORMAT}"
        )
    # folders of earlier versions have none
    if checksum is not None and checksum != _checksum(values, folder / WEIGHTS_FILE):
        raise ValueError(
            f"{CONFIG_FILE} or {WEIGHTS_FILE} is damaged: the checksum is another; export it again"
        )
    safetensors = _safetensors()
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} is damaged: {error}") from None
    return values.pop("model", "nvae"), values, state


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "exported folders need the safetensors package: pip install 'nvae[hub]'"
        ) from None
    return safetensors
