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
from nvae.training.checkpointing import checkpoint_step, latest_checkpoint
from nvae.training.shared_folder import shared_unused_path, unused_path

_PACKAGES = ("nvae", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are, and where it starts.

    Attributes:
        path: the folder.
        checkpoint: to resume from; None: from the beginning.
        step: optimiser steps done already.
    """

    path: Path
    checkpoint: Path | None = None
    step: int = 0

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"


def open_run(
    path: Path, resume: str, config: dict[str, Any], processes: int = 1
) -> tuple[RunFolder, list[str]]:
    """Decide where a run starts.

    Args:
        path: the folder that the run's name gives.
        resume: ``auto`` | ``never`` | ``must``.
        config: of this start, plain types.
        processes: of the run; all of them call this and get the same folder.

    Returns:
        The folder, and lines that say which settings differ from the resumed run's.

    Raises:
        ValueError: another architecture, or nothing to resume where that is a must.
        CheckpointError: the folder's checkpoints cannot be read.
    """
    if resume == "never":
        return RunFolder(unused_path(path) if processes == 1 else shared_unused_path(path)), []
    found = latest_checkpoint(path / "checkpoints")
    if found is None:
        if resume == "must":
            raise ValueError(
                f"resume=must, but {path} has no checkpoint; check name, or use resume=auto"
            )
        return RunFolder(path), []
    file, checkpoint = found
    changed = differences(checkpoint["model_config"], config["model"], "model.")
    if changed:
        raise ValueError(
            f"{path} holds a run of another architecture ({'; '.join(changed)}); give this run "
            "another name=..., or resume=never to start beside it"
        )
    notes = differences(checkpoint["run_config"] or {}, config)
    return RunFolder(path, file, checkpoint_step(checkpoint)), notes


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` of every setting that differs, nested keys dotted, sorted."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def describe_start(folder: RunFolder, config: dict[str, Any], command: list[str]) -> None:
    """Write `config.yaml`, and append this start to `starts.jsonl`: when, what, with which code."""
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
