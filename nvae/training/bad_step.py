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
        self._step: list[Tensor] = []
        self._kept: Tensor | None = None
        self._images = 0

    def add(self, loss: Loss, batch: int, index: Tensor) -> None:
        """Take in a micro-batch; the host does not wait.

        Args:
            loss: of it.
            batch: its number in the run, which is part of its noise's key.
            index: of its images in their split, ``(B,)``.
        """
        if not self._step and self._kept is None:
            self._images, self._names = len(index), list(loss.terms)
        device = loss.kl_per_group.device
        padded = torch.full((self._images,), -1.0, dtype=torch.float64, device=device)
        padded[: len(index)] = index[: self._images]
        terms = torch.stack([term.double() for term in loss.terms.values()])
        every = torch.full((len(self._names),), math.nan, dtype=torch.float64, device=device)
        every[: len(terms)] = terms[: len(every)]  # the regularizers come with the last alone
        self._groups = len(loss.kl_per_group)
        number = torch.full((1,), float(batch), dtype=torch.float64, device=device)
        parts = [number, loss.kl_per_group.double(), loss.sigma_range.double().flatten()]
        self._step.append(torch.cat([*parts, every, padded]))

    def judge(self, begins: Tensor, step: int, norm: Tensor, parameter: Tensor) -> None:
        """End a step; the host does not wait.

        Args:
            begins: whether it is bad and the one before was not, a 0-d bool.
            step: its number, counted from 1.
            norm: of the gradient, a 0-d tensor.
            parameter: index of the one whose gradient was worst, a 0-d tensor.
        """
        rows = torch.stack(self._step)
        rows = torch.nn.functional.pad(
            rows, (0, 0, 0, self._micro_batches - len(rows)), value=math.nan
        )
        number = torch.full_like(norm, step)
        now = torch.cat([torch.stack([number, norm, parameter.double()]), rows.flatten()])
        self._step = []
        if self._kept is None:
            self._kept = torch.zeros_like(now)
        is_first = begins & (self._kept[0] == 0)
        self._kept = torch.where(is_first, now, self._kept)

    def take(self) -> dict[str, Any] | None:
        """What a streak began with since the last reading, on this rank; waits for the device."""
        if self._kept is None or not self._kept[0]:
            return None
        step, norm, parameter, *values = self._kept.tolist()
        self._kept = torch.zeros_like(self._kept)
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
