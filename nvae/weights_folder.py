"""A model as a folder of two plain files: `model.safetensors` and `config.json`.

The names are those that other programs look for. `config.json` is the model's configuration, with
the format's version and a checksum beside it; the tensors have the names of
:meth:`HierarchicalVAE.state_dict`.
"""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from nvae.files import read_json, replacing, write_json
from nvae.models import MODELS, HierarchicalVAE

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = 1


def write_weights(model: HierarchicalVAE, folder: Path) -> None:
    """Write both files, each of them atomically.

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
