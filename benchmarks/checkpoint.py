"""What checking a checkpoint costs: `python -m benchmarks.checkpoint experiment=cifar10`.

Writes a training checkpoint of that model (weights, average, two moments) to a temporary folder,
then times the check of the weights, the check of the whole file, and all of `load_model`.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import measure
from nvae.checkpoint import describe, load_model, save_checkpoint
from nvae.cli.common import keep_freed_memory
from nvae.cli.config import compose_train
from nvae.torch_file import inspect_torch_file


def main(overrides: Sequence[str]) -> None:
    keep_freed_memory()
    model = compose_train(overrides).build_model()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {
        number: {name: torch.zeros_like(p) for name in ("exp_avg", "exp_inf")}
        for number, p in enumerate(model.parameters())
    }
    content = {
        **describe(model),
        "state_dict": state,
        "current_model_state": {name: tensor.clone() for name, tensor in state.items()},
        "optimizer_states": [{"state": moments}],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.ckpt"
        save_checkpoint(content, path)
        print(f"{path.stat().st_size / 2**30:.2f} GiB, {len(state)} tensors of weights")
        weights = ("nvae_format", "model_config", "state_dict")
        for what, work in (
            ("checking the weights", lambda: inspect_torch_file(path, weights)),
            ("checking everything", lambda: inspect_torch_file(path)),
            ("load_model in all", lambda: load_model(path)),
        ):
            found = measure(work, "cpu", warmup=1, runs=5)
            print(f"{what:24}{found.median:8.0f} ms  ({found.fastest:.0f} to {found.slowest:.0f})")


if __name__ == "__main__":
    main(sys.argv[1:])
