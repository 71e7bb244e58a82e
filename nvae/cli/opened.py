"""A checkpoint as the commands open it: file or exported folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nvae.checkpoint import WEIGHTS_FILE, Weights, is_weights_folder, load_checkpoint, load_model
from nvae.models import HierarchicalVAE
from nvae.models.cells import CELL_FAMILIES
from nvae.models.likelihoods import LIKELIHOODS


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


def open_checkpoint(path: str, weights: str, plugins: Sequence[str] = ()) -> OpenedCheckpoint:
    """Open what :func:`load_model` reads.

    Args:
        path: file or exported folder.
        weights: ``ema`` or ``raw``.
        plugins: ``package.module:NAME`` of likelihoods and cell families that the checkpoint may
            name; what is not among them is not imported.

    Raises:
        CheckpointError: see there.
        ValueError: other weights, or a plugin that is none.
    """
    for plugin in plugins:
        _import_plugin(plugin)
    model = load_model(path, cast(Weights, weights))  # which checks it
    if is_weights_folder(path):
        return OpenedCheckpoint(Path(path) / WEIGHTS_FILE, model, "exported", {})
    checkpoint = load_checkpoint(path)
    averaged = weights == "ema" and "current_model_state" in checkpoint
    said = checkpoint.get("run_config")
    run_config = said if isinstance(said, dict) else {}
    return OpenedCheckpoint(Path(path), model, "averaged" if averaged else "raw", run_config)


def _import_plugin(name: str) -> None:
    try:
        LIKELIHOODS[name]
    except ValueError as no_likelihood:
        try:
            CELL_FAMILIES[name]
        except ValueError:
            reason = str(no_likelihood).partition(": ")[2] or "it is no likelihood or cell family"
            raise ValueError(f"plugins=[{name}] cannot be used: {reason}") from None
