"""Machine code ahead of time with TorchInductor, and the form of a decoder that suits it."""

import copy
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InductorError

from nvae.models.layers import SqueezeExcitation
from nvae.sampling.decoder import PriorDecoder


class CompilerError(ValueError):
    """The compiler is missing or failed; the message is one line."""


def machine_code(module: nn.Module, arguments: tuple[Any, ...]) -> bytes:
    """Compile ``module`` ahead of time for arguments of these shapes (AOTInductor).

    On the CPU this has no Python left in a call: for small batches a third faster than what
    `torch.compile` makes.

    Args:
        module: weights become part of the code.
        arguments: an example.

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
        elif isinstance(child, nn.Conv2d) and _is_pointwise(child):
            setattr(module, name, _PointwiseLinear(child))
        else:
            _rewrite_for_cpu(child)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1) and not any(
        conv.padding
    )


class _SummedGate(nn.Module):
    """Squeeze-and-excitation whose two small products are sums.

    A library call for a ``(B, 128)`` by ``(128, 8)`` product costs 20 us, twice in every cell;
    the sum melts into the mean before it.
    """

    def __init__(self, original: SqueezeExcitation) -> None:
        super().__init__()
        self.reduce, self.expand = original.reduce, original.expand

    def gate(self, x: Tensor) -> Tensor:
        """As :meth:`SqueezeExcitation.gate`."""
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
