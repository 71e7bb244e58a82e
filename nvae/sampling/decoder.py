"""The half of a model that makes images, as a function of noise and temperatures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nvae.models import HierarchicalVAE
from nvae.models.folding import fold


class PriorDecoder(nn.Module):
    """A copy of the model without its encoder, with normalisations folded into fixed weights.

    A pure function of its inputs, so that it can be traced, compiled and replayed.

    Args:
        model: as it is now; later changes of its weights or statistics do not reach the copy.
    """

    def __init__(self, model: HierarchicalVAE) -> None:
        super().__init__()
        self.model = model.without_encoder()
        with torch.no_grad():
            fold(self.model)

    def forward(self, noise: Sequence[Tensor], temperature: Tensor) -> Tensor:
        """Logits ``(B, K, H, W)``.

        Args:
            noise: standard normal, one ``(B, L, h, w)`` a group, coarsest first.
            temperature: ``(G,)``, factor on every group's sigma, >= 0.
        """
        # sigma * (t * eps) is (t * sigma) * eps; the walk's own temperatures are numbers
        scaled = [eps * t for eps, t in zip(noise, temperature.unbind(), strict=True)]
        state, _ = self.model.top_down(scaled)
        return self.model.decode_state(state)

    def example(self, batch: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
        """Arguments of :meth:`forward` for ``batch`` images."""
        device = self.model.device
        noise = self.model.draw_noise(batch, torch.Generator(device).manual_seed(seed))
        return noise, torch.linspace(0.5, 1.0, len(noise), device=device)
