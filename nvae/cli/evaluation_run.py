"""What the modes of `evaluate.py` share: device, processes and their shares, protocol, output."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from nvae.cli.checkpoint_data import OpenedCheckpoint
from nvae.cli.common import (
    file_sha256,
    open_device,
    precision_name,
    recalibrated,
    short_hash,
    versions,
)
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.data.dataset import ImageBatch
from nvae.files import read_json
from nvae.models import HierarchicalVAE
from nvae.ops.library import check_kernels

_PATIENCE = timedelta(days=7)
"""A process that is done waits for the slowest, which may be hours behind on another GPU: torch's
half an hour would end both. One that fails still ends all at once: `torchrun` sees to that."""


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of processes; more than one where `torchrun` started us."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    # only records and features travel, from the CPU
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank(), world
    finally:
        dist.destroy_process_group()


def first_images(batches: Iterator[ImageBatch], count: int) -> Iterator[ImageBatch]:
    """The first ``count`` images of a split or of a share of it, 0 or more."""
    if not count:
        return
    for batch in batches:
        count -= len(batch.x)
        if count < 0:
            yield batch[:count]
        else:
            yield batch
        if count <= 0:
            return


def rank_device(config: EvaluateConfig, rank: int, world: int) -> torch.device:
    """The device of this process."""
    if world > 1 and config.device.startswith("cuda:"):
        raise ValueError(
            f"device={config.device} is one GPU, and there are {world} processes: with device=cuda "
            "each has its own"
        )
    device = open_device(config.device, tf32=config.tf32)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    check_kernels(config.kernels, device)
    return device


@contextmanager
def statistics(
    config: EvaluateConfig, weights: Path, model: HierarchicalVAE, *, shown: bool
) -> Iterator[None]:
    """BN statistics as the settings ask for, inside the block."""
    if not config.recalibrate_bn:
        yield
        return
    with recalibrated(
        model, weights, [config.statistics_temperature] * model.num_groups,
        batches=config.recalibrate_bn, batch_size=config.bn_batch_size, seed=config.bn_seed,
        shown=shown,
    ):  # fmt: skip
        yield


def likelihood_protocol(
    config: EvaluateConfig, opened: OpenedCheckpoint, labels: str | None = None
) -> dict[str, Any]:
    """Everything that a likelihood depends on beside the images.

    Args:
        config: of the command.
        opened: the checkpoint.
        labels: SHA-256 of those that the model is told; None where it is told none.
    """
    recalibration = {
        "batches": config.recalibrate_bn,
        "temperature": config.statistics_temperature,
        "batch_size": config.bn_batch_size,
        "seed": config.bn_seed,
    }
    part = {} if config.max_images is None else {"max_images": config.max_images}
    return {
        "checkpoint_sha256": file_sha256(opened.file),
        "weights": opened.weights,
        **({} if opened.settings is None else {"settings": opened.settings}),
        **part,
        "importance_samples": list(config.bounds.importance_samples),
        "elbo_samples": config.elbo_samples,
        **({"labels": labels is not None} if opened.model.config.num_classes else {}),
        **({} if labels is None else {"labels_sha256": labels}),
        "seed": config.seed,
        "batch_norm": recalibration if config.recalibrate_bn else "running statistics",
        "precision": precision_name(tf32=config.tf32),
    }


def output_path(config: EvaluateConfig, weights: Path, protocol: dict[str, Any], what: str) -> Path:
    """Where the result goes; ``what`` it is of stands in the name."""
    if config.output:
        return Path(config.output)
    name = f"{weights.stem}-{what}-{short_hash(protocol)}.json"
    return weights.parent / "evaluation" / name


def already_done(
    output: Path, protocol: dict[str, Any], overwrite: bool, *, shown: bool = True
) -> bool:
    """Whether the very same evaluation is there; another one in its place is an error."""
    if overwrite or not output.exists():
        return False
    try:
        found = read_json(output)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("protocol") != protocol:
        raise ValueError(
            f"{output} is there already and holds something else; give another output or "
            "overwrite=true"
        )
    if shown:
        print(f"done before, with the same settings: {output}\noverwrite=true evaluates again")
    return True


def run_facts(
    config: EvaluateConfig, device: torch.device, world: int, started: float
) -> dict[str, Any]:
    """What a result says of the run itself, and no number depends on; ``started``: monotonic."""
    return {
        "checkpoint": config.checkpoint,
        "seconds": round(monotonic() - started, 1),
        "chunk": config.chunk,
        "processes": world,
        "versions": versions(device),
    }
