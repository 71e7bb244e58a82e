"""What a checkpoint costs: the step that waits for it, and whoever checks it.

`python -m benchmarks.checkpoint experiment=cifar10` writes a training checkpoint of that model
(weights, average, two moments) to a temporary folder, then times the check of the weights, the
check of the whole file, and all of `load_model`.

`python -m benchmarks.checkpoint stall experiment=ffhq256` times how long a step waits, with an
average and without: before, when it waited until the file was written and read back, and now. The
host needs twice the checkpoint in memory, 11 GB for that one.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import composed, measure
from nvae.checkpoint import describe, load_model, save_checkpoint
from nvae.cli.common import keep_freed_memory
from nvae.models import HierarchicalVAE
from nvae.torch_file import inspect_torch_file
from nvae.training.checkpointing import write_checked
from nvae.training.snapshot import BackgroundWriter

MOMENTS = ("exp_avg", "exp_inf")
"""Of Adamax."""


def content_of(model: HierarchicalVAE, *, averaged: bool = True) -> dict[str, Any]:
    """What training saves of a model; of one on meta, numbers of no meaning."""

    def filled(like: torch.Tensor) -> torch.Tensor:
        return like.clone() if not like.is_meta else torch.full_like(like, 0.5, device="cpu")

    state = {f"model.{name}": filled(tensor) for name, tensor in model.state_dict().items()}
    raw = {"current_model_state": {k: t.clone() for k, t in state.items()}} if averaged else {}
    moments = {
        number: {name: filled(p.detach()) for name in MOMENTS}
        for number, p in enumerate(model.parameters())
    }
    optimizer = [{"state": moments}]
    return {**describe(model), "state_dict": state, **raw, "optimizer_states": optimizer}


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All of a checkpoint."""
    if isinstance(value, torch.Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value
    return [t for e in entries if isinstance(e, dict | list | torch.Tensor) for t in tensors_of(e)]


def check(model: HierarchicalVAE) -> None:
    """Print what reading costs."""
    content = content_of(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.ckpt"
        save_checkpoint(content, path)
        tensors = len(content["state_dict"])
        print(f"{path.stat().st_size / 2**30:.2f} GiB, {tensors} tensors of weights")
        weights = ("nvae_format", "model_config", "state_dict")
        for what, work in (
            ("checking the weights", lambda: inspect_torch_file(path, weights)),
            ("checking everything", lambda: inspect_torch_file(path)),
            ("load_model in all", lambda: load_model(path)),
        ):
            found = measure(work, "cpu", warmup=1, runs=5)
            print(f"{what:24}{found.median:8.0f} ms  ({found.fastest:.0f} to {found.slowest:.0f})")


def stall(model: HierarchicalVAE, *, averaged: bool, times: int = 2) -> None:
    """Print how long a step waits for its checkpoint."""
    content = content_of(model, averaged=averaged)
    tensors, writer = tensors_of(content), BackgroundWriter()
    size = sum(t.untyped_storage().nbytes() for t in tensors) / 1e9
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    name = "with an average" if averaged else "without an average"
    print(f"{parameters:.0f} M parameters, {name}: {len(tensors)} tensors, {size:.1f} GB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.ckpt"

        def write(copied: Any) -> None:
            write_checked(copied, path)

        for _ in range(times):
            print(f"before  the step waits {seconds(lambda: write(content)):6.2f} s")
        for _ in range(1 + times):  # the first gets its memory
            begin = time.perf_counter()
            waits = seconds(lambda: writer.save(content, write, tensors))
            copied = waits + seconds(writer.settle)
            writer.wait()
            print(
                f"now     the step waits {waits:6.2f} s, the next optimizer step may come after "
                f"{copied:.2f} s, the file is there after {time.perf_counter() - begin:.2f} s",
                flush=True,
            )


def seconds(work: Callable[[], object]) -> float:
    """Of the wall clock."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main(words: Sequence[str]) -> None:
    keep_freed_memory()
    if words[:1] == ["stall"]:
        with torch.device("meta"):
            model = composed(words[1:] or ["experiment=ffhq256"]).build_model()
        for averaged in (False, True):
            stall(model, averaged=averaged)
    else:
        check(composed(words).build_model())


if __name__ == "__main__":
    main(sys.argv[1:])
