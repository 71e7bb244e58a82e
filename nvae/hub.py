"""The model with Hugging Face's `from_pretrained`, `save_pretrained` and `push_to_hub`.

Needs the huggingface_hub package: ``pip install 'nvae[hub]'``. Folders are those of
:mod:`nvae.export`; :func:`nvae.checkpoint.load_model` reads them without it.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from nvae.export.card import model_card
from nvae.models import NVAE, ModelConfig
from nvae.weights_folder import write_weights


class HubNVAE(NVAE, PyTorchModelHubMixin):
    """An :class:`NVAE` that local folders and the Hugging Face Hub hold.

    Args:
        config: architecture and likelihood.
    """

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
        write_weights(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> "HubNVAE":
        """As the library does it, but a missing weight is an error unless asked for."""
        model: HubNVAE = super()._from_pretrained(strict=strict, **kwargs)
        return model
