"""The decoding half of a model, plain and compiled: machine code on CPU, a CUDA graph on a GPU."""

import copy
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.models import HierarchicalVAE, Temperature
from nvae.models.conditioning import NO_LABEL, check_labels
from nvae.models.folding import fold
from nvae.models.layers import SqueezeExcitation


class CompilerError(ValueError):
    """The compiler is missing or failed; the message is one line."""


class PriorDecoder(nn.Module):
    """A copy of the model without its encoder, with normalizations folded into fixed weights.

    A pure function of its inputs, so that it can be traced, compiled and replayed. Later changes of
    the model's weights or statistics do not reach it.

    Args:
        model: on the device where it will run.
        stands_alone: made of PyTorch's own operations alone, for a program that is to run without
            this package; else the model's choice of kernels holds.
        guidance: see :meth:`HierarchicalVAE.draw_state`.
    """

    def __init__(
        self, model: HierarchicalVAE, *, stands_alone: bool = False, guidance: float = 1.0
    ) -> None:
        super().__init__()
        self.guidance = guidance
        self.model = model.without_encoder()
        if stands_alone:
            self.model.choose_kernels("reference")
        with torch.no_grad():
            fold(self.model)

    def forward(
        self, noise: Sequence[Tensor], temperature: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Logits ``(B, K, H, W)``.

        Args:
            noise: standard normal, one ``(B, L, h, w)`` a group, coarsest first.
            temperature: ``(G,)``, factor on every group's sigma, >= 0.
            labels: ``(B,)`` int64, of a model that knows classes.
        """
        # sigma * (t * eps) is (t * sigma) * eps; the model's own temperatures are numbers
        scaled = [eps * t for eps, t in zip(noise, temperature.unbind(), strict=True)]
        state = self.model.draw_state(scaled, 1.0, labels, self.guidance)
        return self.model.decode_state(state)

    def example(self, batch: int, seed: int = 0) -> tuple[Any, ...]:
        """Arguments of :meth:`forward` for ``batch`` images; labels where the model knows any."""
        device = self.model.device
        noise = self.model.draw_noise(batch, torch.Generator(device).manual_seed(seed))
        temperature = torch.linspace(0.5, 1.0, len(noise), device=device)
        classes = self.model.config.num_classes
        if not classes:
            return noise, temperature
        return noise, temperature, torch.arange(batch, device=device) % classes


class CompiledDecoder:
    """Logits of draws from the prior, compiled for one batch size.

    Smaller batches are filled up and cut off again, so nothing is compiled twice. On the CPU the
    code is made here, ahead of time; on a GPU by `torch.compile` at the first call, and replayed
    as a CUDA graph from then on. Later changes of the model's weights do not reach it.

    Args:
        model: on its device.
        batch_size: most images in a call.
        guidance: see :meth:`HierarchicalVAE.draw_state`.

    Raises:
        CompilerError: on the CPU, no working C++ compiler.
    """

    def __init__(self, model: HierarchicalVAE, batch_size: int, guidance: float = 1.0) -> None:
        self.batch_size = batch_size
        self._model = model
        decoder = for_inductor(PriorDecoder(model, guidance=guidance))
        if model.device.type == "cuda":
            self._run = torch.compile(decoder, mode="reduce-overhead", fullgraph=True)
        else:
            self._run = load_machine_code(machine_code(decoder, decoder.example(batch_size)))

    def __call__(
        self, noise: Sequence[Tensor], temperature: Temperature, labels: Tensor | None = None
    ) -> Tensor:
        """Logits ``(B, K, H, W)``; on a GPU valid until the next call.

        Args:
            noise: as :meth:`HierarchicalVAE.top_down` takes it, B at most ``batch_size``.
            temperature: as :meth:`HierarchicalVAE.sample_logits` takes it.
            labels: classes ``(B,)`` int64; None: none.

        Raises:
            ValueError: too many images, a bad temperature, or labels of a model without classes.
        """
        batch = noise[0].shape[0]
        missing = self.batch_size - batch
        if missing < 0:
            raise ValueError(f"{batch} images, but the decoder is compiled for {self.batch_size}")
        full = [F.pad(eps, (0,) * 7 + (missing,)) for eps in noise] if missing else list(noise)
        temperatures = torch.tensor(self._model.group_temperatures(temperature)).to(full[0])
        classes = self._model.config.num_classes
        check_labels(labels, classes, batch)
        if not classes:
            return self._run(full, temperatures)[:batch]
        filled = torch.full((self.batch_size,), NO_LABEL, device=full[0].device)
        if labels is not None:
            filled[:batch] = labels
        return self._run(full, temperatures, filled)[:batch]


def machine_code(module: nn.Module, arguments: tuple[Any, ...]) -> bytes:
    """Compile ``module`` ahead of time for arguments of these shapes (AOTInductor).

    On the CPU this has no Python left in a call: for small batches a third faster than what
    `torch.compile` makes. The weights become part of the code.

    Returns:
        A package for :func:`load_machine_code`; as a file it ends in ``.pt2``. It fits the kind of
        processor and the torch version that made it.

    Raises:
        CompilerError: the C++ compiler is missing or failed.
    """
    package = io.BytesIO()
    with torch.no_grad(), _compiling():
        program = torch.export.export(module, arguments)
        torch._inductor.aoti_compile_and_package(
            program, package_path=package, inductor_configs={"freezing": True}
        )
    return package.getvalue()


def load_machine_code(package: Path | bytes) -> Callable[..., Tensor]:
    """What :func:`machine_code` made, or its file, as a function of the module's arguments.

    It is code and runs: load no file from strangers.
    """
    source = io.BytesIO(package) if isinstance(package, bytes) else str(package)
    return torch._inductor.aoti_load_package(source)


@contextmanager
def _compiling() -> Iterator[None]:
    """Turn what the compiler raises into a :class:`CompilerError`; no warning about absent CUDA."""
    # imported here: it takes a second, and plain sampling needs none of it
    from torch._inductor.exc import CppCompileError, InductorError

    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (InductorError, CppCompileError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CompilerError(
            "the sampler could not be compiled; a C++ compiler (g++ or clang++) is needed: "
            f"{lines[0] if lines else type(error).__name__}"
        ) from error
    finally:
        logger.setLevel(level)


def for_inductor(decoder: PriorDecoder) -> PriorDecoder:
    """A copy that compiles to faster code; the same numbers but for rounding."""
    fast = copy.deepcopy(decoder).to(memory_format=torch.channels_last)
    if fast.model.device.type == "cpu":
        _rewrite_for_cpu(fast)
    return fast


def _rewrite_for_cpu(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, SqueezeExcitation):
            setattr(module, name, _SummedGate(child))
        elif type(child) is nn.Conv2d and _is_pointwise(child):  # a subclass may do more
            setattr(module, name, _PointwiseLinear(child))
        else:
            _rewrite_for_cpu(child)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1) and not any(
        conv.padding
    )


class _SummedGate(SqueezeExcitation):
    """Squeeze-and-excitation whose two small products are sums.

    A library call for a ``(B, 128)`` by ``(128, 8)`` product costs 20 us, twice in every cell;
    the sum melts into the mean before it.
    """

    def __init__(self, original: SqueezeExcitation) -> None:
        nn.Module.__init__(self)
        self.reduce, self.expand = original.reduce, original.expand

    def gate(self, x: Tensor) -> Tensor:
        """What :meth:`SqueezeExcitation.gate` gives, but for rounding."""
        hidden = F.relu(_sum_linear(x.mean((2, 3)), self.reduce))
        return torch.sigmoid(_sum_linear(hidden, self.expand))[:, :, None, None]


def _sum_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return (x[:, None, :] * layer.weight).sum(-1) + layer.bias


class _PointwiseLinear(nn.Module):
    """A 1x1 convolution as a linear layer over channels_last pixels.

    With its weight packed ahead of time, oneDNN's product is faster than its convolution on
    small maps.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.flatten(1).contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` to ``(B, C_out, H, W)``."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)
