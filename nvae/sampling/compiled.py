"""The top-down walk compiled: machine code on the CPU, a CUDA graph on a GPU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.models import HierarchicalVAE, Temperature
from nvae.sampling.decoder import PriorDecoder
from nvae.sampling.inductor import for_inductor, load_machine_code, machine_code


class CompiledDecoder:
    """Logits of draws from the prior, compiled for one batch size.

    Fewer images are filled up and cut off again, so nothing is compiled twice. On the CPU the code
    is made here, ahead of time; on a GPU by `torch.compile` at the first call, and replayed as a
    CUDA graph from then on.

    Args:
        model: as it is now, on its device; later changes of its weights do not reach this.
        batch_size: most images in a call.

    Raises:
        CompilerError: on the CPU, no working C++ compiler.
    """

    def __init__(self, model: HierarchicalVAE, batch_size: int) -> None:
        self.batch_size = batch_size
        self._group_temperatures = model.group_temperatures
        decoder = for_inductor(PriorDecoder(model))
        if model.device.type == "cuda":
            self._run = torch.compile(decoder, mode="reduce-overhead", fullgraph=True)
        else:
            self._run = load_machine_code(machine_code(decoder, decoder.example(batch_size)))

    def __call__(self, noise: Sequence[Tensor], temperature: Temperature) -> Tensor:
        """Logits ``(B, K, H, W)``; on a GPU valid until the next call.

        Args:
            noise: as :meth:`HierarchicalVAE.top_down` takes it, B at most ``batch_size``.
            temperature: as :meth:`HierarchicalVAE.sample_logits` takes it.

        Raises:
            ValueError: too many images, or a bad temperature.
        """
        batch = noise[0].shape[0]
        missing = self.batch_size - batch
        if missing < 0:
            raise ValueError(f"{batch} images, but the decoder is compiled for {self.batch_size}")
        full = [F.pad(eps, (0,) * 7 + (missing,)) for eps in noise] if missing else list(noise)
        temperatures = torch.tensor(self._group_temperatures(temperature))
        logits: Tensor = self._run(full, temperatures.to(full[0]))
        return logits[:batch]
