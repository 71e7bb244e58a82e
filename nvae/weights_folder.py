"""A model as a folder of two plain files: `model.safetensors` and `config.json`.

The names are those that other programs look for. `config.json` is the model's configuration, with
the format's version beside it; the tensors have the names of :meth:`NVAE.state_dict`.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from nvae.files import replacing, write_json
from nvae.models import NVAE, ModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = 1


def write_weights(model: NVAE, folder: Path) -> None:
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
    write_json(folder / CONFIG_FILE, {"nvae_format": FORMAT, **model.config.to_dict()})


def is_weights_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a configuration."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_weights(folder: str | Path) -> NVAE:
    """The model of a folder, float32, on the CPU.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a file is missing, damaged, or of another format.
        RuntimeError: the tensors do not fit the configuration.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"the folder has no {name}")
    model = NVAE(_read_config(folder / CONFIG_FILE))
    safetensors = _safetensors()
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} is damaged: {error}") from None
    model.load_state_dict(state)
    return model


def _read_config(file: Path) -> ModelConfig:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} is no JSON object")
    version = values.pop("nvae_format", None)
    if version != FORMAT:
        raise ValueError(
            f"{file.name} has nvae_format {version}; this version of nvae reads {FORMAT}"
        )
    return ModelConfig.from_dict(values)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "exported folders need the safetensors package: pip install 'nvae[hub]'"
        ) from None
    return safetensors
