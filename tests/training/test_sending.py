"""A checkpoint read once, by the first rank, is the same on all."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import save_model
from nvae.models import NVAE, ModelConfig
from nvae.training import checkpointing, ranks
from nvae.training.checkpointing import AtomicCheckpointIO
from tests.training.ranks import run_ranks
from tests.training.runs import assert_identical


def _content() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 4, 4, generator=generator)
    return {
        "state_dict": OrderedDict(a=image, b=torch.arange(7), c=torch.tensor(True)),
        "optimizer": [{"m": image.to(memory_format=torch.channels_last), "step": 3}, (1.5, None)],
        "empty": torch.zeros(0, 5),
        "half": image.bfloat16()[:, :, 1:, ::2],
        5: "text",
    }


def _strides(content: Any) -> list[tuple[int, ...]]:
    return [content["optimizer"][0]["m"].stride(), content["half"].stride()]


def _sent(rank: int, world: int, parcel: int) -> int:
    ranks.PARCEL = parcel
    expected = _content()
    received = ranks.from_first_rank(lambda: _content() if rank == 0 else 1 / 0)  # type: ignore[arg-type, return-value]
    assert type(received["state_dict"]) is OrderedDict
    assert _strides(received) == _strides(expected)
    assert torch.are_deterministic_algorithms_enabled() is False
    return assert_identical(expected, received)


@pytest.mark.parametrize("parcel", [1, 150, 2**20])
def test_others_get_what_the_first_has_read(parcel: int) -> None:
    assert run_ranks(_sent, 2, parcel) == [6, 6]


TINY = ModelConfig(
    image_size=8, num_scales=1, groups_per_scale=1, preprocess_blocks=1, preprocess_cells=1,
    postprocess_cells=1, encoder_channels=4, decoder_channels=4, latent_channels=2,
)  # fmt: skip


def _loaded(rank: int, world: int, path: str) -> tuple[int, str]:
    """How often this rank has read the file, and what came of it."""
    reads = []
    original = checkpointing.load_checkpoint

    def counted(path: Any) -> dict[str, Any]:
        reads.append(path)
        return original(path)

    checkpointing.load_checkpoint = counted  # type: ignore[assignment]
    try:
        loaded = AtomicCheckpointIO().load_checkpoint(path)
    except Exception as error:
        return len(reads), f"{type(error).__name__}: {error}"
    assert_identical(loaded, original(path))
    return len(reads), "loaded"


def test_a_checkpoint_is_read_by_the_first_rank_alone(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.ckpt"
    save_model(NVAE(TINY), path)
    assert run_ranks(_loaded, 2, str(path)) == [(1, "loaded"), (0, "loaded")]
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 4, len(content) // 2):  # padding has no checksum
        content[place] ^= 1
    path.write_bytes(content)
    (first, told), (other, too) = run_ranks(_loaded, 2, str(path))
    assert (first, other) == (1, 0)
    assert told.startswith(f"CheckpointError: {path}")
    assert too == told.replace("CheckpointError", "OtherRankError")
