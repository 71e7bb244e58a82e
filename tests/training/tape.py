"""Graphs without a GPU: operations are recorded with their tensors, and a replay repeats them.

As with a CUDA graph, capturing computes nothing that stays: what it overwrites is put back, and the
memory that it makes is poisoned. A replay knows no Python: numbers are those of the capture, memory
is where it was, and the versions of what is written do not count up. What a capturing stream
forbids is forbidden: to read the device, or to copy to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvae.objective import Loss

READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}
FORBIDDEN = "operation not permitted when stream is capturing"


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation says it overwrites."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += tensors_of(value)
    return found


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._outside: set[int] = set()
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(FORBIDDEN)
        self._outside |= {_place(t) for t in tensors_of((args, kwargs))} - self._made.keys()
        self._before += [(t, t.clone()) for t in written_by(func, args, kwargs)]
        out = func(*args, **kwargs)
        for t in tensors_of(out):
            if _place(t) not in self._outside:
                self._made.setdefault(_place(t), t)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        """Nothing was computed."""
        for t, before in reversed(self._before):
            t.copy_(before)
        self._before.clear()
        for t in self._made.values():
            if t.is_floating_point():
                t.fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        below = torch._C._AutoDispatchBelowADInplaceOrView()  # which counts versions
        with torch.autocast("cpu", enabled=False), below:
            for func, args, kwargs, out in self.calls:
                for old, new in zip(
                    tensors_of(out), tensors_of(func(*args, **kwargs)), strict=True
                ):
                    if _place(old) != _place(new):
                        old.copy_(new)


class TapeGraphs:
    """As :class:`nvae.training.captured.CudaGraphs`.

    Attributes:
        captured: tapes so far.
        fail_at: the capture that fails at its end, counted from 0.
    """

    captured: int = 0
    fail_at: int | None = None

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def run(self, function: Callable[[], Loss]) -> Loss:
        return function()

    def capture(self, function: Callable[[], Loss]) -> tuple[Loss, Callable[[], None]]:
        tape = Tape()
        try:
            with tape:
                result = function()
            if self.fail_at == self.captured:
                raise RuntimeError(FORBIDDEN)
        finally:
            tape.undo()
        self.captured += 1
        return result, tape.replay
