"""What a step pays for an average and for shared statistics: `python -m benchmarks.per_step`.

The moving average against torch's own on the same tensors: milliseconds and operations an update.
Batch normalization in a process group (of this process alone: no network) against the formula in
eager float64 that it had before: milliseconds, and bytes kept for the backward pass an element.
"""

import argparse
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import measure
from nvae.models.normalization import EPS
from nvae.ops import batch_norm, reference
from nvae.training.ema import MovingAverage

DECAY = 0.9999


class Operations(TorchDispatchMode):
    """Counts what is dispatched inside."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def floats_averaged(averaged: Any, current: Any, count: Any) -> None:
    """torch's average; counters are copied."""
    if averaged[0].is_floating_point():
        get_ema_multi_avg_fn(DECAY)(averaged, current, count)
    else:
        torch._foreach_copy_(averaged, current)


class Tensors(pl.LightningModule):
    """Cells of a large network: one weight of 512 x 512 and 16 small tensors in each."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        width = 512
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), *(nn.BatchNorm1d(width) for _ in range(3)))
            for _ in range(cells)
        )


def averages(device: str, runs: int) -> None:
    """Both on a list of 130 million numbers."""
    module = Tensors(500).to(device)
    tensors = [*module.parameters(), *module.buffers()]
    print(f"average of {sum(t.numel() for t in tensors) / 1e6:.0f} M in {len(tensors)} tensors")
    theirs = AveragedModel(module, multi_avg_fn=floats_averaged, use_buffers=True)
    theirs.n_averaged = torch.zeros((), dtype=torch.long)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=module.device), global_step=0, optimizers=[]
    )
    ours = MovingAverage(DECAY)
    ours.setup(trainer, module, "fit")
    ours.on_train_start(trainer, module)

    def step() -> None:
        trainer.global_step += 1
        ours.on_train_batch_end(trainer, module, None, None, 0)

    _report("torch's AveragedModel", lambda: theirs.update_parameters(module), device, runs)
    _report("nvae's MovingAverage", step, device, runs)


def _report(what: str, step: Callable[[], object], device: str, runs: int) -> None:
    step()
    with Operations() as operations:
        step()
    time = measure(step, device, warmup=1, runs=runs)
    print(
        f"  {what:24}{time.median:8.1f} ms ({time.fastest:.1f} to {time.slowest:.1f})"
        f"{operations.number:9} operations"
    )


def eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Sums in float64 and a normalization in float32, differentiated by autograd."""
    wide = x.double()
    sums = torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    moments = reference.moments(sums, None, x.numel() // x.shape[1], EPS)
    mean, rstd, gamma, beta = (
        t.float().view(1, -1, 1, 1) for t in (moments[0], moments[1], gamma, beta)
    )
    return ((x.float() - mean) * (gamma * rstd) + beta).to(x.dtype)


def shared_statistics(device: str, runs: int) -> None:
    """Forward and backward of one layer."""
    shape = (16, 128, 32, 32)
    gamma, beta = (torch.ones(128, device=device, requires_grad=True) for _ in range(2))
    paths: dict[str, Callable[[Tensor], Tensor]] = {
        "eager float64": lambda x: eager(x, gamma, beta),
        "in a process group": lambda x: batch_norm(x, gamma, beta, group=dist.group.WORLD),
        "one process, torch's": lambda x: batch_norm(x, gamma, beta),
    }
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn_like(x)
        print(f"batch normalization of {shape}, {dtype}")
        for name, norm in paths.items():
            kept: dict[int, int] = {}

            def pack(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                norm(x)

            def step(norm: Any = norm, x: Tensor = x, dy: Tensor = dy) -> Any:
                return torch.autograd.grad(norm(x), [x, gamma, beta], dy)

            time = measure(step, device, warmup=2, runs=runs)
            print(
                f"  {name:24}{time.median:8.1f} ms ({time.fastest:.1f} to {time.slowest:.1f})"
                f"{sum(kept.values()) / x.numel():9.2f} bytes kept an element"
            )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--runs", type=int, default=11)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    averages(options.device, options.runs)
    backend = "nccl" if options.device.startswith("cuda") else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/s", rank=0, world_size=1)
        shared_statistics(options.device, options.runs)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
