"""The step that a streak of bad ones began with: on the device until it is read, then a file.

Whether a step is bad is known on the device alone, and weights move on before the host reads it. So
every step's few numbers are put into one vector, which is kept where a streak begins.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvae.command_line import brief
from nvae.files import write_json
from nvae.objective import Loss
from nvae.training.ranks import has_others

FOLDER = "bad_steps"
MOST_FILES = 20


class FirstBadStep:
    """Of each streak that begins after the last reading, the first one alone.

    Args:
        seed: of the noise of training.
        rank: of this process.
        micro_batches: of a step, at most.
    """

    def __init__(self, seed: int, rank: int, micro_batches: int) -> None:
        self._seed, self._rank, self._micro_batches = seed, rank, micro_batches
        self._rows: Tensor | None = None  # of the step at hand, one a micro-batch

    def add(self, loss: Loss, batch: int | Tensor, index: Tensor) -> None:
        """Take in a micro-batch; the host does not wait. What is kept stays where it is in memory.

        Args:
            loss: of it.
            batch: its number in the run, which is part of its noise's key; a 0-d tensor where the
                device alone knows.
            index: of its images in their split, ``(B,)``.
        """
        if self._rows is None:
            self._images, self._names = len(index), list(loss.terms)
        device = loss.kl_per_group.device
        padded = torch.full((self._images,), -1.0, dtype=torch.float64, device=device)
        padded[: len(index)] = index[: self._images]
        terms = torch.stack([term.double() for term in loss.terms.values()])
        every = torch.full((len(self._names),), math.nan, dtype=torch.float64, device=device)
        every[: len(terms)] = terms[: len(every)]  # the regularizers come with the last alone
        self._groups = len(loss.kl_per_group)
        number = _filled(batch, loss.kl_per_group.double()).reshape(1)
        parts = [number, loss.kl_per_group.double(), loss.sigma_range.double().flatten()]
        row = torch.cat([*parts, every, padded])
        if self._rows is None:
            self._rows = row.new_full((self._micro_batches, len(row)), math.nan)
            self._next = torch.zeros(1, dtype=torch.long, device=device)
            self._kept = row.new_zeros(3 + self._rows.numel())
        self._rows.index_copy_(0, self._next, row.unsqueeze(0))
        self._next += 1

    def judge(self, begins: Tensor, step: int | Tensor, norm: Tensor, parameter: Tensor) -> None:
        """End a step; the host does not wait.

        Args:
            begins: whether it is bad and the one before was not, a 0-d bool.
            step: its number, counted from 1; a 0-d tensor where the device alone knows.
            norm: of the gradient, a 0-d tensor.
            parameter: index of the one whose gradient was worst, a 0-d tensor.
        """
        assert self._rows is not None
        head = torch.stack([_filled(step, norm), norm, parameter.double()])
        now = torch.cat([head, self._rows.flatten()])
        is_first = begins & (self._kept[0] == 0)
        self._kept.copy_(torch.where(is_first, now, self._kept))
        self._rows.fill_(math.nan)  # a step of fewer micro-batches leaves the last ones so
        self._next.zero_()

    def take(self) -> dict[str, Any] | None:
        """What a streak began with since the last reading, on this rank; waits for the device."""
        if self._rows is None or not self._kept[0]:
            return None
        step, norm, parameter, *values = self._kept.tolist()
        self._kept.zero_()
        width = len(values) // self._micro_batches
        rows = (values[i : i + width] for i in range(0, len(values), width))
        return {
            "step": int(step),
            "gradient_norm": _number(norm),
            "parameter": int(parameter),
            "micro_batches": [self._described(row) for row in rows if not math.isnan(row[0])],
        }

    def _described(self, row: list[float]) -> dict[str, Any]:
        groups, number, rest = self._groups, int(row[0]), row[1:]
        kl, *ranges = (rest[groups * i : groups * (i + 1)] for i in range(5))
        terms = rest[5 * groups : 5 * groups + len(self._names)]
        index = rest[5 * groups + len(self._names) :]
        return {
            "rank": self._rank,
            "noise_key": [self._seed, self._rank, number],
            "images": [int(i) for i in index if i >= 0],
            "loss": {name: _number(term) for name, term in zip(self._names, terms, strict=True)},
            "kl_per_group": [_number(value) for value in kl],
            "posterior_sigma": _pairs(*ranges[:2]),
            "prior_sigma": _pairs(*ranges[2:]),
        }


def _filled(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d float64 tensor; the host's number is filled in, not copied."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.full((), float(value), dtype=torch.float64, device=like.device)


def _pairs(low: list[float], high: list[float]) -> list[list[float | str]]:
    return [[_number(a), _number(b)] for a, b in zip(low, high, strict=True)]


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def write_bad_step(folder: Path, found: dict[str, Any] | None, parameters: list[str]) -> None:
    """`bad_steps/step_N.json` in a run's folder, of all ranks' images; every rank calls this.

    At most :data:`MOST_FILES` of them. One that cannot be written is a line on stderr.

    Args:
        folder: of the run.
        found: what :meth:`FirstBadStep.take` gave, None on all ranks alike.
        parameters: those with a gradient, by index.
    """
    if found is None:
        return
    everyone = [found]
    if has_others():
        everyone = [found] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        if dist.get_rank():
            return
    content = {
        "step": found["step"],
        "gradient_norm": found["gradient_norm"],
        "worst_gradient": parameters[found["parameter"]],
        "micro_batches": [each for rank in everyone for each in rank["micro_batches"]],
    }
    place = folder / FOLDER
    try:
        if len(list(place.glob("step_*.json"))) < MOST_FILES:
            write_json(place / f"step_{found['step']:08d}.json", content)
    except OSError as error:
        print(f"the first bad step could not be described: {brief(error)}", file=sys.stderr)
