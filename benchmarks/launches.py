"""How many operations a training step starts, counted without a GPU.

    python -m benchmarks.launches experiment=cifar10

On one GPU every operation is at least one launch, which costs the host five to ten microseconds; a
step of a deep network can wait for the host more than for its work. The step is traced with
tensors that have no storage, in bfloat16, with the kernels' ops in place; views and allocations do
not count. The weights' moving average goes along in Adamax's pass. Not counted: what the guard, the
average of the running statistics and the loader start.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import composed
from nvae.cli.config import TrainConfig
from nvae.models import normalization, together
from nvae.models.layers import DataInitConv2d
from nvae.objective import Objective
from nvae.ops import library
from nvae.training.optimizers import Adamax, WeightAverages, build_optimizer

FREE = {
    "view", "as_strided", "expand", "permute", "transpose", "t", "detach", "alias", "split",
    "split_with_sizes", "unbind", "slice", "select", "unsqueeze", "squeeze", "_unsafe_view",
    "_reshape_alias", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided",
    "device", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
"""Operations of ATen that start nothing on a device."""


class Operations(TorchDispatchMode):
    """Counts what starts work, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.split("::")[-1]
        if name not in FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def operations_of_a_step(config: TrainConfig, batch: int) -> dict[str, Operations]:
    """Forward, backward and optimizer of the second step of a run."""
    with FakeTensorMode(allow_non_fake_inputs=True), kernels_in_place():
        model = config.build_model()
        for module in model.modules():
            if isinstance(module, DataInitConv2d):
                module.checked = True  # there is nothing to read
            for name, p in module.named_parameters(recurse=False):
                if p.ndim == 4:  # Module.to does not take parameters without storage
                    laid_out = p.detach().to(memory_format=torch.channels_last)
                    setattr(module, name, nn.Parameter(laid_out))
            for name, b in module.named_buffers(recurse=False):
                if b.ndim == 4:
                    setattr(module, name, b.to(memory_format=torch.channels_last))
        objective = Objective(model, config.objective)
        if objective.spectral_norm is not None:
            objective.spectral_norm.is_warm = True
        optimizer = build_optimizer(config.optimizer, model.parameters())
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        if type(optimizer) is Adamax:
            averages: dict[Tensor, Tensor] = {p: torch.empty_like(p) for p in model.parameters()}
            optimizer.moving = WeightAverages(averages, torch.zeros((), dtype=torch.float64))
        x = torch.rand(batch, *model.config.image_shape)
        x = x.to(memory_format=torch.channels_last)
        for _ in range(2):  # the first makes the optimizer's state
            noise = model.draw_noise(batch)
            counted = {name: Operations() for name in ("forward", "backward", "optimizer")}
            with counted["forward"], torch.autocast("cpu", torch.bfloat16):
                loss = objective(model, x, noise, step=15, total_steps=100)
                total = loss.data if loss.penalty is None else loss.data + loss.penalty
            with counted["backward"]:
                total.backward()
            with counted["optimizer"]:
                optimizer.step()
            optimizer.zero_grad()
    return counted


@contextlib.contextmanager
def kernels_in_place() -> Iterator[None]:
    """The registered ops are taken as on a GPU, by tensors that say they are on the CPU: a backward
    pass on a GPU that is not there cannot be traced."""

    def use_kernel(impl: str, x: torch.Tensor, kernel_size: int = 1) -> bool:
        return impl != "reference" and x.is_contiguous(memory_format=torch.channels_last)

    with (
        mock.patch.object(library, "use_kernel", use_kernel),
        mock.patch.object(normalization, "has_kernels", return_value=True),
        mock.patch.object(together, "has_kernels", return_value=True),
    ):
        yield


def main() -> None:
    """Print the counts."""
    config = composed(sys.argv[1:] or ["experiment=cifar10"])
    counted = operations_of_a_step(config, batch=32)
    for name, operations in counted.items():
        most = ", ".join(f"{op} {n}" for op, n in operations.counts.most_common(12))
        print(f"{name:10} {operations.total:6}  {most}")
    print(f"{'step':10} {sum(o.total for o in counted.values()):6}")


if __name__ == "__main__":
    main()
