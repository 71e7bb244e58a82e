"""Checkpoints: written atomically, read without running anything they contain.

One format serves training checkpoints and exported weights: a dictionary of plain types and
tensors, with the keys

- ``nvae_format``: 1,
- ``model_config``: :meth:`ModelConfig.to_dict`,
- ``run_config``: the configuration of the run that wrote it, or None,
- ``state_dict``: the network's entries prefixed ``model.``; averaged weights where the run kept
  an average, with the raw ones in ``current_model_state``,

beside whatever the trainer needs to resume. The published format is read too.
"""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch

from nvae.files import replacing
from nvae.models import NVAE, ModelConfig
from nvae.published import is_published, load_published
from nvae.weights_folder import is_weights_folder, read_weights

FORMAT = 1
MODEL_PREFIX = "model."
Weights = Literal["ema", "raw"]


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another format, or not to be trusted."""


def describe(model: NVAE, run_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entries that make a training checkpoint readable by :func:`load_model`."""
    return {
        "nvae_format": FORMAT,
        "model_config": model.config.to_dict(),
        "run_config": run_config,
    }


def save_model(model: NVAE, path: str | Path, run_config: dict[str, Any] | None = None) -> None:
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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary of a checkpoint of this project or of the published format, on the CPU.

    Raises:
        CheckpointError: one line that says what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        # mmap reads only what is used: a training checkpoint is mostly optimiser state
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint: {first_line}") from None
    if not isinstance(checkpoint, dict) or not (
        is_published(checkpoint) or _is_ours(checkpoint, path)
    ):
        raise CheckpointError(
            f"{path} holds neither a checkpoint of this project nor one of the published format"
        )
    return checkpoint


def load_model(path: str | Path, weights: Weights = "ema") -> NVAE:
    """The network of a checkpoint, in evaluation mode, float32, on the CPU, channels_last.

    Args:
        path: a training checkpoint, exported weights, a checkpoint in the published format, or a
            folder that :mod:`nvae.export` wrote.
        weights: ``ema`` takes the averaged weights where there are any, ``raw`` never; published
            files and folders hold one set.

    Raises:
        CheckpointError: if the file is missing, damaged, of another format, would run code, or
            if its weights do not fit its configuration.
        ModuleNotFoundError: a folder, and safetensors is not installed.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; allowed: ema, raw")
    exported = is_weights_folder(path)
    checkpoint = {} if exported else load_checkpoint(path)
    try:
        if exported:
            model = read_weights(path)
        elif is_published(checkpoint):
            model = load_published(checkpoint)
        else:
            model = NVAE(ModelConfig.from_dict(checkpoint["model_config"]))
            model.load_state_dict(_network_state(checkpoint, weights))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not describe a usable model: {detail}") from None
    # convolutions hand this layout on, whatever the input's; their kernels are faster in it
    return model.to(memory_format=torch.channels_last).eval()


def _network_state(checkpoint: dict[str, Any], weights: Weights) -> dict[str, torch.Tensor]:
    state = checkpoint["state_dict"]
    if weights == "raw":
        state = checkpoint.get("current_model_state", state)
    return {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(MODEL_PREFIX)
    }


def _is_ours(checkpoint: dict[str, Any], path: Path) -> bool:
    version = checkpoint.get("nvae_format")
    if version is None:
        return False
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format version {version}; this version of nvae reads {FORMAT}"
        )
    return {"model_config", "state_dict"} <= checkpoint.keys()


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    if found:
        return (
            f"{path} is refused: it asks for {found[1]}, which could run code; nothing was run. "
            "Checkpoints hold tensors and plain types only"
        )
    return f"{path} is damaged or no checkpoint: it cannot be read as tensors and plain types"
