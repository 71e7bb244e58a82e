"""An error or a decision of one rank is that of all."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from nvae.training.ranks import OtherRankError, on_first_rank, raise_everywhere, together
from tests.training.ranks import run_ranks


def _caught(action: Callable[[], Any]) -> str:
    try:
        return f"gave {action()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _block(rank: int, failing: int) -> str:
    with together():
        if rank == failing:
            raise OSError(f"no space left for {rank}")
    return "done"


def _all(rank: int, world: int) -> list[str]:
    def first() -> dict[str, Any]:
        assert rank == 0
        return {"process": os.getpid(), "step": 3}

    def refuses() -> None:
        raise ValueError("in use")

    shared = on_first_rank(first)
    own = OSError("mine") if rank == 1 else None
    return [
        str(shared),
        _caught(lambda: on_first_rank(refuses)),
        _caught(lambda: _block(rank, 1)),
        _caught(lambda: _block(rank, 0)),
        _caught(lambda: _block(rank, 7)),
        _caught(lambda: raise_everywhere(own)),
        _caught(lambda: raise_everywhere(None)),
        _caught(lambda: raise_everywhere(OSError(f"of {rank}"))),
        str(dist.get_world_size()),
    ]


def test_what_one_rank_meets_reaches_all() -> None:
    first, second = run_ranks(_all, 2)
    assert first[0] == second[0]
    assert [first[1], second[1]] == ["ValueError: in use", "OtherRankError: in use"]
    assert [first[2], second[2]] == [
        "OtherRankError: no space left for 1", "OSError: no space left for 1",
    ]  # fmt: skip
    assert [first[3], second[3]] == [
        "OSError: no space left for 0", "OtherRankError: no space left for 0",
    ]  # fmt: skip
    assert first[4] == second[4] == "gave done"
    assert [first[5], second[5]] == ["OtherRankError: mine", "OSError: mine"]
    assert first[6] == second[6] == "gave None"
    assert [first[7], second[7]] == ["OSError: of 0", "OtherRankError: of 0"]


def test_one_process_alone_needs_no_group() -> None:
    assert on_first_rank(lambda: 3) == 3
    raise_everywhere(None)
    with pytest.raises(OSError, match="mine"), together():
        raise OSError("mine")
    assert not issubclass(OtherRankError, OSError)
