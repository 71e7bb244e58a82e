"""Ranks that begin with different weights or buffers are told so."""

from pathlib import Path

import pytest
import torch

from nvae.models import NVAE, ModelConfig
from nvae.training.ranks import EqualRanks, check_equal, digest
from nvae.training.trainer import TrainerConfig, build_trainer
from tests.training.ranks import run_ranks

TINY = ModelConfig(
    image_size=8, num_scales=1, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1,
    postprocess_cells=1, encoder_channels=4, decoder_channels=4, latent_channels=2,
)  # fmt: skip


def _checked(rank: int, world: int, changed: str | None) -> str | None:
    torch.manual_seed(0)
    model = NVAE(TINY)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if rank == 1 and changed is not None:
        with torch.no_grad():
            value = tensors[changed].view(-1)
            value[-1] = torch.nextafter(value[-1], torch.tensor(9.0))
    try:
        check_equal(tensors.items())
    except RuntimeError as error:
        return str(error)
    return None


def _some(kind: str) -> str:
    names = [name for name, _ in (*NVAE(TINY).named_parameters(), *NVAE(TINY).named_buffers())]
    return next(name for name in reversed(names) if kind in name)


@pytest.mark.parametrize("kind", ["running_var", "weight"])
def test_one_bit_on_one_rank_is_found_on_all(kind: str) -> None:
    name = _some(kind)
    told = run_ranks(_checked, 2, name)
    assert told[0] == told[1]
    assert told[0].startswith(f"{name} (")


def test_equal_ranks_begin() -> None:
    assert run_ranks(_checked, 2, None) == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_knows_values_and_places(dtype: torch.dtype) -> None:
    values = [torch.tensor([1, 0, 0, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 0, 0])]
    found = [int(digest(value.to(dtype))) for value in values]
    assert len(set(found)) == 3
    assert found[0] == int(digest(values[0].to(dtype).reshape(2, 2).t().contiguous().t()))


def test_several_processes_are_checked(tmp_path: Path) -> None:
    def checks(devices: int) -> int:
        config = TrainerConfig(accelerator="cpu", devices=devices)
        trainer = build_trainer(config, [], [], tmp_path)
        return sum(isinstance(c, EqualRanks) for c in trainer.callbacks)  # type: ignore[attr-defined]

    assert (checks(1), checks(2)) == (0, 1)
