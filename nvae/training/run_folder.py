"""A run's folder: found, made, described, and resumed."""

import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nvae.files import replacing
from nvae.training.checkpointing import checkpoint_step, newest_checkpoint
from nvae.training.resuming import Plain, check_resumable, conflicts, epochs_begun_and_done

_PACKAGES = ("nvae", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are, and where it starts.

    Attributes:
        path: the folder.
        checkpoint: to resume from; None: from the beginning.
        step: optimiser steps done already.
        epochs: whole epochs done already.
        passed_over: newer checkpoints that cannot be read, and why; a line each.
    """

    path: Path
    checkpoint: Path | None = None
    step: int = 0
    epochs: int = 0
    passed_over: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"


def open_run(
    path: Path, resume: str, config: Plain, fingerprint: Plain | None = None
) -> tuple[RunFolder, list[str]]:
    """Decide where a run starts.

    Args:
        path: the run's folder, see :class:`~nvae.training.shared_folder.Claim`.
        resume: ``auto`` | ``never`` | ``must``.
        config: of this start, plain types.
        fingerprint: of this start's images and seeds; None: not compared.

    Returns:
        The folder, and lines that say which settings differ from the resumed run's.

    Raises:
        ValueError: another architecture, other images, seeds or batches, fewer epochs than are
            done, or nothing to resume where that is a must.
        CheckpointError: the folder's checkpoints cannot be read, or not be resumed from.
    """
    if resume == "never":
        return RunFolder(path), []
    found = newest_checkpoint(path / "checkpoints")
    if found is None:
        if resume == "must":
            raise ValueError(
                f"resume=must, but {path} has no checkpoint; check name, or use resume=auto"
            )
        return RunFolder(path), []
    checkpoint = found.content
    check_resumable(checkpoint, found.path)
    begun, done = epochs_begun_and_done(checkpoint)
    for what, changed in (
        (
            "of another architecture",
            differences(checkpoint["model_config"], config["model"], "model."),
        ),
        ("that does not go on with these settings", conflicts(checkpoint, config, fingerprint)),
    ):
        if changed:
            raise ValueError(
                f"{path} holds a run {what} ({'; '.join(changed)}); give this run another "
                "name=..., or resume=never to start beside it"
            )
    epochs = config["trainer"]["max_epochs"]
    if begun > epochs:
        raise ValueError(
            f"{path} is in epoch {begun} already, beyond trainer.max_epochs={epochs}; give more "
            "epochs, or another name=..."
        )
    folder = RunFolder(path, found.path, checkpoint_step(checkpoint), done, found.passed_over)
    return folder, differences(checkpoint["run_config"], config)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` of every setting that differs, nested keys dotted, sorted."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys(), key=str):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def describe_start(folder: RunFolder, config: dict[str, Any], command: list[str]) -> None:
    """Write `config.yaml`, and append this start to `starts.jsonl`: when, what, with which code.

    Raises:
        ValueError: one of them cannot be written.
    """
    try:
        _describe(folder, config, command)
    except OSError as error:
        raise ValueError(
            f"cannot write config.yaml and starts.jsonl in {folder.path}: "
            f"{error.strerror or error}; make room or put it right, then run the same command again"
        ) from error


def _describe(folder: RunFolder, config: dict[str, Any], command: list[str]) -> None:
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with replacing(folder.path / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False))
    start = {
        "step": folder.step,
        "resumed_from": None if folder.checkpoint is None else folder.checkpoint.name,
        "command": command,
        "git": git_revision(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    with (folder.path / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Commit of the code that runs, with ``+`` where files differ from it; None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
