"""What a checkpoint must hold for a run to go on from it, and what must be as it was.

Lightning takes what it finds: a counter of another type ends in a traceback, one of another value
in another schedule. So everything but tensors is looked at first.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nvae.checkpoint import CheckpointError
from nvae.training.run_length import ENTRY, images_a_step, processes

Plain = dict[str, Any]

_LARGEST_COUNT = 1 << 53
_TYPES: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "model_config": dict,
    "run_config": dict,
    "callbacks": dict,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_TYPES_IF_THERE: dict[str, type] = {
    "fingerprint": dict,
    ENTRY: dict,
    "current_model_state": dict,
    "averaging_state": dict,
}
_ORDER = ("completed", "processed", "started", "ready")
"""A counter of Lightning's never exceeds those after it."""

_PROGRESSES = ("batch_progress", "scheduler_progress", "val_loop.batch_progress")

_FIXED = (
    "seed",
    "data.seed",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "optimizer.name",
)
"""Settings on which the schedule, the order of the data or the optimizer's state depends."""

_FIXED_WITH_LIMITS = ("data.global_batch", "data.batch_size", "trainer.accumulate_grad_batches")
"""Settings that may change because everything else is counted in images."""

_FIXED_WITHOUT_FINGERPRINT = ("data.train_size", "data.split_seed")
"""What stands for the images themselves in checkpoints of earlier versions."""


def check_resumable(checkpoint: Plain, path: Path) -> None:
    """Raise unless a checkpoint's content, its tensors aside, can be resumed from.

    Raises:
        CheckpointError: one line that names the entry.
    """
    try:
        _check_content(checkpoint, path)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} cannot be resumed from: {reason}; remove it to go on from an earlier one, or "
            "use resume=never"
        ) from None


def _check_content(checkpoint: Plain, path: Path) -> None:
    for name, kind in _TYPES.items():
        _check_type(name, checkpoint[name], kind)
    for name, kind in _TYPES_IF_THERE.items():
        if name in checkpoint:
            _check_type(name, checkpoint[name], kind)
    for section in ("data", "trainer", "optimizer", "model"):
        _check_type(f"run_config.{section}", checkpoint["run_config"][section], dict)
    for name in (*_FIXED_WITH_LIMITS, "trainer.devices", "trainer.num_nodes"):
        value = _lookup(checkpoint["run_config"], name)
        if value is not None:  # earlier versions do not say all of them
            _check_count(f"run_config.{name}", value)
    images_a_step(checkpoint["run_config"])
    step = checkpoint["global_step"]
    named = re.fullmatch(r"step_(\d+)\.ckpt", path.name)
    if step < 0 or (named is not None and step != int(named[1])):
        raise ValueError(f"global_step is {step}, which does not fit the file's name")
    scale = checkpoint["learning_rate_scale"]
    if not _is_number(scale) or not 0 < scale <= 1:
        raise ValueError(f"learning_rate_scale is {scale!r}, not above 0 and at most 1")
    if ENTRY in checkpoint:
        for name in ("seen", "a_step"):
            _check_count(f"{ENTRY}.{name}", checkpoint[ENTRY][name])
    if "fingerprint" in checkpoint:
        _check_fingerprint(checkpoint["fingerprint"])
    _check_callbacks(checkpoint["callbacks"], step)
    _check_loops(checkpoint["loops"], step)
    overfits = checkpoint["run_config"]["trainer"].get("overfit_batches")
    if not overfits and not checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]:
        raise ValueError("it does not say where in the training images it was")
    _check_epoch(checkpoint)
    if not checkpoint["optimizer_states"]:
        raise ValueError("optimizer_states is empty")
    for index, state in enumerate(checkpoint["optimizer_states"]):
        _check_optimizer(state, f"optimizer_states[{index}]")
    schedule = checkpoint["run_config"]["optimizer"].get("schedule")
    if schedule:  # another than ours
        _check_type("run_config.optimizer.schedule", schedule, dict)
    else:
        _check_schedule(checkpoint["lr_schedulers"], step)


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _check_count(name: str, value: Any, most: int = _LARGEST_COUNT) -> None:
    _check_type(name, value, int)
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}, not between 0 and {most}")


def _check_fingerprint(fingerprint: Plain) -> None:
    _check_type("fingerprint.seed", fingerprint["seed"], int)
    _check_type("fingerprint.model", fingerprint["model"], dict)
    _check_type("fingerprint.data", fingerprint["data"], dict)
    _check_type("fingerprint.data.seed", fingerprint["data"]["seed"], int)
    _check_type("fingerprint.data.splits", fingerprint["data"]["splits"], dict)
    for name, split in fingerprint["data"]["splits"].items():
        _check_type(f"fingerprint.data.splits.{name}", split, dict)
        _check_count(f"fingerprint.data.splits.{name}.images", split["images"])
        _check_type(f"fingerprint.data.splits.{name}.sha256", split["sha256"], str)
        if "labels" in split:
            _check_type(f"fingerprint.data.splits.{name}.labels", split["labels"], str)


def _check_callbacks(callbacks: Plain, step: int) -> None:
    for name, state in callbacks.items():
        _check_type(f"callbacks.{name}", state, dict)
    best = callbacks["Checkpoints"]["best"]
    # one that is not finite is of an earlier version, and is beaten by any number
    if best is not None and (not isinstance(best, int | float) or isinstance(best, bool)):
        raise ValueError(f"callbacks.Checkpoints.best is a {type(best).__name__}, not a number")
    _check_count("callbacks.Checkpoints.best_step", callbacks["Checkpoints"]["best_step"], step)
    if "BadSteps" in callbacks:
        _check_count("callbacks.BadSteps.accepted", callbacks["BadSteps"]["accepted"], step)
    if "MovingAverage" in callbacks:
        latest = callbacks["MovingAverage"]["latest_update_step"]
        _check_count("callbacks.MovingAverage.latest_update_step", latest, step)


def _check_loops(loops: Plain, step: int) -> None:
    for name, value in _leaves(loops, "loops"):
        if not name.endswith(".is_last_batch"):
            _check_count(name, value)
    fit = loops["fit_loop"]
    steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for name, progress in (
        ("epoch_progress", fit["epoch_progress"]),
        *((name, fit[f"epoch_loop.{name}"]) for name in _PROGRESSES),
        *((name, steps[name]) for name in ("step", "zero_grad")),
    ):
        _check_progress(name, progress)
    for name, value in _holders(loops, "loops"):
        if value.keys() & {"total", "current"}:
            _check_progress(name, value)
    _check_loader(fit)
    epochs = fit["epoch_loop.state_dict"]
    # it lags by the interrupted batches
    _check_count("loops' _batches_that_stepped", epochs["_batches_that_stepped"], step)
    found = steps["step"]["total"]["completed"]
    if found != step:
        raise ValueError(f"loops count {found} steps, global_step is {step}")


def _check_progress(name: str, progress: Any) -> None:
    """Lightning would take counters that are not there for zeros."""
    _check_type(name, progress, dict)
    total, current = progress["total"], progress["current"]
    for counters in (total, current):
        _check_type(name, counters, dict)
        for key, count in counters.items():
            _check_count(f"{name}.{key}", count)
        counts = [counters[key] for key in _ORDER if key in counters]
        if not {"ready", "completed"} <= counters.keys() or counts != sorted(counts):
            raise ValueError(f"{name} is {counters}, which no run counts")
    if not isinstance(progress.get("is_last_batch", False), bool):
        raise ValueError(f"{name}.is_last_batch is no bool")
    if total.keys() != current.keys():
        raise ValueError(f"{name} counts {', '.join(total)} in all and {', '.join(current)} now")


def _check_loader(loop: Plain) -> None:
    """Of the training images; without it an epoch would start over. Overfitting has none."""
    states = loop["state_dict"].get("combined_loader", [])
    _check_type("the loaders' state", states, list)
    for state in states:
        _check_type("the loader's state", state, dict)
        for name in ("epoch", "position", "size", "seed"):
            _check_count(f"the loader's {name}", state[name])
        if state["position"] > state["size"]:
            raise ValueError(f"the loader's position is beyond its {state['size']} images")


def _check_epoch(checkpoint: Plain) -> None:
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    if abs(checkpoint["epoch"] - progress["processed"]) > 1:
        raise ValueError(f"epoch is {checkpoint['epoch']}, loops count {progress['processed']}")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{name}[{index}]")
    else:
        yield name, value


def _holds_numbers(value: Any) -> bool:
    """Whether a setting or a list of them has no text and nothing that is not finite."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(
        each is None or isinstance(each, bool | torch.Tensor) or _is_number(each) for each in values
    )


def _holders(value: Any, name: str) -> Iterator[tuple[str, Plain]]:
    """Every dictionary in ``value``."""
    if isinstance(value, dict):
        yield name, value
        for key, entry in value.items():
            yield from _holders(entry, f"{name}.{key}")


def _check_optimizer(state: Any, name: str) -> None:
    _check_type(name, state, dict)
    _check_type(f"{name}.param_groups", state["param_groups"], list)
    parameters: list[int] = []
    for index, group in enumerate(state["param_groups"]):
        _check_type(f"{name}.param_groups[{index}]", group, dict)
        parameters += group["params"]
        for key, value in group.items():
            if key != "params" and not _holds_numbers(value):
                raise ValueError(f"{name}.param_groups[{index}].{key} holds no numbers")
    if parameters != list(range(len(parameters))):
        raise ValueError(f"{name}.param_groups' params do not count from 0")
    _check_type(f"{name}.state", state["state"], dict)
    for index, entries in state["state"].items():
        _check_count(f"{name}.state's key", index, len(parameters) - 1)
        _check_type(f"{name}.state[{index}]", entries, dict)
        for key, value in entries.items():
            if not isinstance(value, torch.Tensor) and not _is_number(value):
                raise ValueError(f"{name}.state[{index}].{key} is no tensor")


def check_optimizer_shapes(checkpoint: Plain, parameters: list[torch.Tensor]) -> None:
    """Raise unless the optimizer's state is that of these parameters.

    Several groups or optimizers are a subclass's: how they share the parameters, torch compares.

    Raises:
        CheckpointError: one line.
    """
    states = checkpoint["optimizer_states"]
    if len(states) != 1 or len(states[0]["param_groups"]) != 1:
        return
    (state,) = states
    (group,) = state["param_groups"]
    if len(group["params"]) != len(parameters):
        raise CheckpointError(
            f"the optimizer's state is of {len(group['params'])} parameters, the model has "
            f"{len(parameters)}"
        )
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.shape not in (
                torch.Size(), parameters[index].shape,
            ):  # fmt: skip
                raise CheckpointError(
                    f"the optimizer's {name} of parameter {index} has the shape "
                    f"{tuple(value.shape)}, the parameter {tuple(parameters[index].shape)}"
                )


def _check_schedule(schedulers: list[Any], step: int) -> None:
    (scheduler,) = schedulers
    _check_type("lr_schedulers[0]", scheduler, dict)
    if scheduler["last_epoch"] != step or isinstance(scheduler["last_epoch"], bool):
        raise ValueError(f"lr_schedulers[0].last_epoch is not global_step={step}")
    for name, value in scheduler.items():
        if not _holds_numbers(value):
            raise ValueError(f"lr_schedulers[0].{name} holds no numbers")
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        _check_type(f"lr_schedulers[0].{name}", scheduler[name], list)


def conflicts(checkpoint: Plain, config: Plain, fingerprint: Plain | None) -> list[str]:
    """``what: old -> new`` of everything that may not change on resuming.

    Args:
        checkpoint: that :func:`check_resumable` let pass.
        config: of this start.
        fingerprint: of this start; None: not asked about.
    """
    old, lines = checkpoint["run_config"], []
    before = checkpoint.get("fingerprint")
    fixed = _FIXED if before is not None else _FIXED + _FIXED_WITHOUT_FINGERPRINT
    for name in fixed:
        was, now = _lookup(old, name), _lookup(config, name)
        if was != now:
            lines.append(f"{name}: {was} -> {now}")
    lines += _other_schedule(old, config) + _other_batches(old, config)
    if before is not None and fingerprint is not None:
        lines += _other_images(before["data"]["splits"], fingerprint["data"]["splits"])
        for name, was, now in (
            ("seed", before["seed"], fingerprint["seed"]),
            ("data.seed", before["data"]["seed"], fingerprint["data"]["seed"]),
        ):
            if was != now:
                lines.append(f"{name}: {was} -> {now}")
    return list(dict.fromkeys(lines))


def _other_schedule(old: Plain, config: Plain) -> list[str]:
    """A schedule's state is of its class, and counts steps or epochs; arguments may change."""
    was, now = (settings["optimizer"].get("schedule") or {} for settings in (old, config))
    for name, default in (("_target_", None), ("interval", "epoch")):
        before, after = (
            str(schedule.get(name, default)).replace(":", ".") for schedule in (was, now)
        )
        if before != after:
            what = "optimizer.schedule" if name == "_target_" else f"optimizer.schedule.{name}"
            return [f"{what}: {before} -> {after}"]
    return []


def _other_batches(old: Plain, config: Plain) -> list[str]:
    """What may not change about batches where something is counted in them, not in images."""
    if old["optimizer"].get("schedule") and images_a_step(old) != images_a_step(config):
        # one of torch's, which knows steps alone
        return [f"images a step, of optimizer.schedule: {images_a_step(old)} -> "
                f"{images_a_step(config)}"]  # fmt: skip
    limits = ("trainer.limit_train_batches", "trainer.overfit_batches")
    if not any(_lookup(old, name) for name in limits):
        return []
    lines = []
    for name in _FIXED_WITH_LIMITS:
        was, now = _lookup(old, name), _lookup(config, name)
        if was != now:
            lines.append(f"{name}: {was} -> {now}")
    if processes(old) != processes(config):
        lines.append(
            f"processes (trainer.devices x num_nodes): {processes(old)} -> {processes(config)}"
        )
    return lines


def _other_images(before: Plain, now: Plain) -> list[str]:
    lines = []
    for split in sorted(before.keys() | now.keys()):
        was, has = (splits.get(split, {"images": 0, "sha256": ""}) for splits in (before, now))
        if was["images"] != has["images"]:
            lines.append(f"{split} images: {was['images']} -> {has['images']}")
        elif was["sha256"] != has["sha256"]:
            lines.append(f"{split} images: others, as many")
        elif "labels" in was and was["labels"] != has.get("labels"):
            lines.append(f"{split} labels: others")
    return lines


def _lookup(settings: Plain, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) and part in value else None
    return value


def epochs_begun_and_done(checkpoint: Plain) -> tuple[int, int]:
    """Epochs whose first batch was trained, and those that are whole."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return int(progress["ready"]), int(progress["processed"])
