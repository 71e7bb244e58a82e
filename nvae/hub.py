"""The model with Hugging Face's `from_pretrained`, `save_pretrained` and `push_to_hub`.

Needs the huggingface_hub package: ``pip install 'nvae[hub]'``. Folders are those of
:mod:`nvae.export`; :func:`nvae.checkpoint.load_model` reads them without it.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download

from nvae.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    is_weights_folder,
    load_model,
    write_weights,
)
from nvae.export.folder import model_card
from nvae.models import NVAE, ModelConfig


class HubNVAE(NVAE, PyTorchModelHubMixin):
    """An :class:`NVAE` that local folders and the Hugging Face Hub hold."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)

    @classmethod
    def of(cls, model: NVAE) -> "HubNVAE":
        """A copy of ``model``, in evaluation mode: ``HubNVAE.of(model).push_to_hub(NAME)``."""
        copy = cls(model.config)
        copy.load_state_dict(model.state_dict())
        return copy.eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that :mod:`nvae.export` writes."""
        return ModelCard(model_card(self))

    def _save_pretrained(self, save_directory: Path) -> None:
        with torch.device("meta"):
            plain = NVAE(self.config)  # the folder names the model, not this class
        plain.load_state_dict(self.state_dict(), assign=True)
        write_weights(plain, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no settings for the model
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> "HubNVAE":
        """The model of a local folder or of the Hub, in evaluation mode, on the CPU.

        Not the library's own way, which takes any settings from `config.json`, fills missing
        weights with random numbers and falls back to a pickle: two files are fetched, and read as
        :func:`load_model` reads a folder. The arguments mean what they mean in the library.

        Raises:
            CheckpointError: a file is missing, damaged, or not what the other one says.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    revision=revision,
                )
            )
        if not is_weights_folder(folder):
            raise CheckpointError(f"{folder} is no exported folder: it has no {CONFIG_FILE}")
        model = load_model(folder)
        if not isinstance(model, NVAE):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, not an NVAE")
        return cls.of(model)
