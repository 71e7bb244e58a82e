"""A checkpoint as the commands open it: file or exported folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nvae.checkpoint import WEIGHTS_FILE, Weights, is_weights_folder, load_checkpoint, load_model
from nvae.models import HierarchicalVAE


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What the commands need to know.

    Attributes:
        file: holds the weights; what is made of them goes beside it.
        model: in evaluation mode, on the CPU.
        weights: ``averaged`` | ``raw`` | ``exported``.
        run_config: the configuration of the run that wrote it, if it says; nothing in it has been
            checked.
    """

    file: Path
    model: HierarchicalVAE
    weights: str
    run_config: dict[str, Any]


def open_checkpoint(path: str, weights: str) -> OpenedCheckpoint:
    """Open what :func:`load_model` reads.

    Args:
        path: file or exported folder.
        weights: ``ema`` or ``raw``.

    Raises:
        CheckpointError: see there.
        ValueError: other weights.
    """
    model = load_model(path, cast(Weights, weights))  # which checks it
    if is_weights_folder(path):
        return OpenedCheckpoint(Path(path) / WEIGHTS_FILE, model, "exported", {})
    checkpoint = load_checkpoint(path)
    averaged = weights == "ema" and "current_model_state" in checkpoint
    said = checkpoint.get("run_config")
    run_config = said if isinstance(said, dict) else {}
    return OpenedCheckpoint(Path(path), model, "averaged" if averaged else "raw", run_config)
