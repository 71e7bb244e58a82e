"""What opening a model may import: each of these costs a second or more."""

import subprocess
import sys

import pytest

HEAVY = (
    *("pytorch_lightning", "lightning_fabric", "torchmetrics", "hydra", "omegaconf", "torchvision"),
    *("torch._dynamo", "torch._inductor", "scipy", "sklearn", "matplotlib", "tensorboard"),
)

COMMAND = ("hydra", "omegaconf")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("nvae.checkpoint", ()),
        ("nvae.models", ()),
        ("nvae.data", ()),
        ("nvae.data.dataset", ()),
        ("nvae.cli.sample", COMMAND),
        ("nvae.cli.evaluate", COMMAND),
        *(("nvae.cli.compress", COMMAND), ("nvae.cli.decompress", COMMAND)),
        ("nvae.codec.codec", ()),
        *(("nvae.sampling", ()), ("nvae.evaluation", ()), ("nvae.evaluation.distances", ())),
    ],
)
def test_only_what_it_needs(module: str, allowed: tuple[str, ...]) -> None:
    script = f"import {module}, sys; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= set(allowed)
