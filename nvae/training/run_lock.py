"""One process at a time works in a run's folder: the first one of a run holds a lock on it.

The kernel keeps the lock and drops it when its process ends, however that happens; a file that a
dead process left behind locks nothing.
"""

import errno
import fcntl
import os
import socket
import stat
import sys
import time
from pathlib import Path
from types import TracebackType

from nvae.files import read_bytes

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
