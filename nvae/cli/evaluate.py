"""`evaluate.py`: the likelihood of a checkpoint, as one JSON file and a table."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from nvae.cli.checkpoint_data import (
    choose_data,
    open_data,
    pixel_protocol,
    split_off_data,
    with_data,
)
from nvae.cli.command import run_command
from nvae.cli.device import open_device
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.evaluate_metrics import (
    check_measurable,
    measure,
    metrics_protocol,
    open_extractor,
)
from nvae.cli.evaluate_processes import process_group, share_of
from nvae.cli.opened import OpenedCheckpoint, open_checkpoint
from nvae.cli.progress import progress_bar
from nvae.cli.provenance import file_sha256, short_hash, versions
from nvae.cli.recalibration import recalibrated
from nvae.cli.schema import build
from nvae.data.dataset import ImageData
from nvae.evaluation import EvaluationResult, RecordStore, evaluate
from nvae.files import read_json, write_json
from nvae.models import HierarchicalVAE

SCHEMA = with_data(EvaluateConfig)


def main() -> None:
    """The command."""
    ConfigStore.instance().store(name="evaluate_schema", node=SCHEMA)
    run_command("evaluate", _run, SCHEMA)


def _run(composed: DictConfig) -> None:
    own, given = split_off_data(composed)
    _evaluate(build(EvaluateConfig, own), given)


def _evaluate(config: EvaluateConfig, given: dict[str, Any]) -> None:
    opened = open_checkpoint(config.checkpoint, config.weights, config.plugins)
    model = opened.model
    chosen = choose_data(given, opened.run_config)
    with process_group() as (rank, world):
        device = _device(config, rank, world)
        extractor = open_extractor(config, device)
        data = open_data(chosen, model.config)
        likelihood = _protocol(config, opened, data)
        protocol = likelihood
        if extractor is not None:
            protocol = {**likelihood, "samples": metrics_protocol(config, extractor)}
        output = _output(config, opened.file, protocol)
        if _already_done(output, protocol, config.overwrite):
            return
        model = model.to(device)
        if extractor is not None:
            check_measurable(config, data, extractor, device, world)
        # without the settings of sample quality: they may change and keep the finished images
        key = short_hash(likelihood)
        partial = output.with_name(f".{opened.file.stem}-{config.split}.partial-{key}")
        started = monotonic()
        with _statistics(config, opened.file, model, shown=rank == 0):
            store = RecordStore(partial, key, rank)
            result = _bound(config, model, data, store, rank, world)
            if rank == 0:
                print(result.table(), flush=True)
            quality = None
            if extractor is not None:
                quality = measure(config, model, data, extractor, rank, world)
        if rank == 0:
            if quality is not None:
                print(_quality_table(quality))
            facts = {
                "checkpoint": config.checkpoint,
                "seconds": round(monotonic() - started, 1),
                "chunk": config.chunk,
                "processes": world,
                "versions": versions(device),
            }
            results = {"result": result.to_dict(), "samples": quality}
            write_json(output, {**results, "protocol": protocol, **facts})
            shutil.rmtree(partial, ignore_errors=True)
            print(f"\nwritten to {output}")


def _bound(
    config: EvaluateConfig,
    model: HierarchicalVAE,
    data: ImageData,
    store: RecordStore,
    rank: int,
    world: int,
) -> EvaluationResult:
    device = model.device
    images = len(range(rank, len(data.split(config.split)), world))
    draws = config.bounds.draws
    with progress_bar("image draws", images * draws, shown=rank == 0) as advance:
        result = evaluate(
            model,
            share_of(data.batches(config.split, device), rank, world),
            importance_samples=config.importance_samples,
            elbo_samples=config.elbo_samples,
            seed=config.seed,
            chunk=config.chunk,
            progress=advance,
            store=store,
            distributed=world > 1,
        )
    if result.images != len(data.split(config.split)):
        raise ValueError(
            f"{store.folder} holds results of images that are not in split={config.split}; "
            "delete it and evaluate again"
        )
    return result


def _quality_table(quality: dict[str, Any]) -> str:
    lines = [f"\n{'samples':24}{quality['generated']:>12}   compared with {quality['real']} images"]
    lines += [f"{k:24}{v:>12.4f}" for k, v in quality.items() if isinstance(v, float)]
    return "\n".join(lines)


@contextmanager
def _statistics(
    config: EvaluateConfig, weights: Path, model: HierarchicalVAE, *, shown: bool
) -> Iterator[None]:
    if not config.recalibrate_bn:
        yield
        return
    with recalibrated(
        model, weights, [config.statistics_temperature] * model.num_groups,
        batches=config.recalibrate_bn, batch_size=config.bn_batch_size, seed=config.bn_seed,
        shown=shown,
    ):  # fmt: skip
        yield


def _protocol(config: EvaluateConfig, opened: OpenedCheckpoint, data: ImageData) -> dict[str, Any]:
    """Everything that the likelihood depends on."""
    recalibration = {
        "batches": config.recalibrate_bn,
        "temperature": config.statistics_temperature,
        "batch_size": config.bn_batch_size,
        "seed": config.bn_seed,
    }
    return {
        "checkpoint_sha256": file_sha256(opened.file),
        "weights": opened.weights,
        "data": pixel_protocol(data, config.split),
        "split": config.split,
        "importance_samples": list(config.bounds.importance_samples),
        "elbo_samples": config.elbo_samples,
        "seed": config.seed,
        "batch_norm": recalibration if config.recalibrate_bn else "running statistics",
        "precision": "float32 with tf32" if config.tf32 else "float32",
    }


def _output(config: EvaluateConfig, weights: Path, protocol: dict[str, Any]) -> Path:
    if config.output:
        return Path(config.output)
    name = f"{weights.stem}-{config.split}-{short_hash(protocol)}.json"
    return weights.parent / "evaluation" / name


def _already_done(output: Path, protocol: dict[str, Any], overwrite: bool) -> bool:
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
    print(f"done before, with the same settings: {output}\noverwrite=true evaluates again")
    return True


def _device(config: EvaluateConfig, rank: int, world: int) -> torch.device:
    device = open_device(config.device, tf32=config.tf32)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    return device
