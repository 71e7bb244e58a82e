"""A run's folder: chosen and locked, described, and resumed.

One process at a time works in it: the first one of a run holds a lock, which the kernel keeps and
drops when the process ends, however that happens; a file that a dead process left behind locks
nothing. The first process also chooses the folder and the checkpoint and tells the others, which
neither list nor read what is there.
"""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import stat
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nvae.files import read_bytes, replacing
from nvae.training.checkpointing import checkpoint_step, newest_checkpoint
from nvae.training.pending import is_pending
from nvae.training.processes import decided
from nvae.training.resuming import Plain, check_resumable, conflicts, epochs_begun_and_done

LOCK_FILE = ".lock"

_PACKAGES = ("nvae", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are, and where it starts.

    Attributes:
        path: the folder.
        checkpoint: to resume from; None: from the beginning.
        step: optimizer steps done already.
        epochs: whole epochs done already.
        passed_over: newer checkpoints that cannot be read, and why; a line each.
        is_pending: a validation is to be done before anything else.
    """

    path: Path
    checkpoint: Path | None = None
    step: int = 0
    epochs: int = 0
    passed_over: tuple[str, ...] = ()
    is_pending: bool = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"


def open_run(
    path: Path, resume: str, config: Plain, fingerprint: Plain | None = None
) -> tuple[RunFolder, list[str]]:
    """Decide where a run starts.

    Args:
        path: the run's folder, see :class:`Claim`.
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
    before = {"architecture": "nvae"} | checkpoint["run_config"]  # older ones do not say it
    was, now = before["architecture"], config["architecture"]
    for what, changed in (
        (
            "of another architecture",
            [f"architecture: {was} -> {now}"]
            if was != now
            else differences(checkpoint["model_config"], config["model"], "model."),
        ),
        ("that does not go on with these settings", conflicts(checkpoint, config, fingerprint)),
    ):
        if changed:
            raise ValueError(
                f"{path} holds a run {what} ({'; '.join(changed)}); give this run another "
                "name=..., or resume=never to start beside it"
            )
    epochs = config["trainer"]["max_epochs"]
    if epochs is not None and begun > epochs:
        raise ValueError(
            f"{path} is in epoch {begun} already, beyond trainer.max_epochs={epochs}; give more "
            "epochs, or another name=..."
        )
    folder = RunFolder(
        path, found.path, checkpoint_step(checkpoint), done, found.passed_over,
        is_pending(checkpoint),
    )  # fmt: skip
    return folder, differences(before, config)


def open_run_once(
    path: Path,
    resume: str,
    config: Plain,
    fingerprint: Plain | None = None,
    *,
    processes: int = 1,
) -> tuple[RunFolder, list[str]]:
    """:func:`open_run` in the first process of several; all have to call this, and get its answer.

    Raises:
        Exception: as :func:`open_run`, in the first process.
        OtherRankError: in the others.
    """
    if processes == 1:
        return open_run(path, resume, config, fingerprint)

    def decide() -> Plain:
        folder, changed = open_run(path, resume, config, fingerprint)
        checkpoint = folder.checkpoint and str(folder.checkpoint)
        return asdict(folder) | {
            "path": str(path), "checkpoint": checkpoint, "changed": changed,
        }  # fmt: skip

    start = decided("start", decide)
    checkpoint = start["checkpoint"] and Path(start["checkpoint"])
    folder = RunFolder(
        path, checkpoint, start["step"], start["epochs"], tuple(start["passed_over"]),
        start["is_pending"],
    )  # fmt: skip
    return folder, start["changed"]


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


class FolderInUseError(ValueError):
    """Another process works in the folder; one line says which."""


class RunLock:
    """A lock on a run's folder, held until :meth:`release` or the process's end.

    The folder is made if need be. The lock's file says who holds it, for the message alone.

    Args:
        folder: of the run.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder cannot be made or written.
        ValueError: the lock's file is no regular file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / LOCK_FILE
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = _open(self._file)
            try:
                self._lock()
                if self._is_current():
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # the one before it has just removed this file
            folder.mkdir(parents=True, exist_ok=True)
        os.ftruncate(self._descriptor, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(self._descriptor, f"{os.getpid()}\n{socket.gethostname()}\n{now}\n".encode(), 0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FolderInUseError(
                f"{self.folder} is in use by {_holder(self._file)}; wait for it, or give this run "
                "another name=..."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{self.folder} is on a file system without locks: see to it that no other "
                "process works in it",
                file=sys.stderr,
            )

    def _is_current(self) -> bool:
        """Whether the locked file is still the folder's."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._file.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the folder back; one that holds nothing but the lock goes."""
        try:
            if self._is_current() and is_unused(self.folder):
                self._file.unlink()
                self.folder.rmdir()
        except OSError:
            pass  # deleted meanwhile, or another process has come
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_unused(folder: Path) -> bool:
    """Whether nothing is there, or nothing but a lock's file."""
    return not folder.exists() or all(path.name == LOCK_FILE for path in folder.iterdir())


def lock_unused(path: Path) -> RunLock:
    """Lock ``path`` itself if nothing is there, else the first free of ``path-2``, ``path-3``, ...

    Two processes that look at once get a folder each.
    """
    candidate, number = path, 1
    while True:
        if is_unused(candidate):
            try:
                lock = RunLock(candidate)
            except FolderInUseError:
                pass
            else:
                if is_unused(candidate):
                    return lock
                lock.release()  # another process was here between the two looks
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")


def _open(file: Path) -> int:
    """Open or make the lock's file; what somebody put in its place is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise ValueError(f"{file} is no regular file; remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file} is no regular file; remove it")
    return descriptor


def _holder(file: Path) -> str:
    try:
        process, host, since = read_bytes(file, 1000).decode().splitlines()
    except (OSError, ValueError):  # it has not written yet
        return "another process"
    return f"process {process} on host {host} since {since}"


class Claim:
    """A run's folder. The first process of the run has it locked until the block ends.

    All processes of a run have to make one, and get the same folder or the same error.

    Args:
        path: that the run's name gives.
        beside: take an unused folder, ``path`` or one beside it, instead of ``path`` as it is.
        processes: of the run.

    Raises:
        ValueError: the folder is in use.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path, *, beside: bool = False, processes: int = 1) -> None:
        self._asked, self._beside = path, beside
        self._lock: RunLock | None = None
        self.path = (
            self._take() if processes == 1 else Path(decided("folder", lambda: str(self._take())))
        )

    def _take(self) -> Path:
        try:
            self._lock = lock_unused(self._asked) if self._beside else RunLock(self._asked)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"{self._asked} cannot be the run's folder: {reason}; check runs_dir and name"
            ) from None
        return self._lock.folder

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
