"""Files: written whole or not at all, and read with a bound on what they may cost."""

import io
import json
import math
import os
import shutil
import stat
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import yaml
from numpy.typing import NDArray

LARGEST_TEXT = 1 << 26
"""Bytes of a JSON or YAML file; ours have some thousands."""

LARGEST_ARRAYS = 1 << 34
"""Bytes of all arrays of an npz file; features of a million images have 8 GiB."""

_ARRAYS_FORMAT = 1
_UMASK = threading.Lock()
_DEEPEST = 50
_MOST_NODES = 1_000_000
_OF_CONSTRUCTORS = (ValueError, KeyError, IndexError, AttributeError, TypeError)
"""What PyYAML lets through for scalars with a wrong tag: `!!bool x`, `!!timestamp x`, `!!int`."""

_OF_ARCHIVES = (
    *(ValueError, KeyError, EOFError, OverflowError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


def user_cache() -> Path:
    """The user's folder for what can be made again, by the XDG base directory specification.

    ``$XDG_CACHE_HOME`` where that is an absolute path, else ``~/.cache``.

    Raises:
        OSError: there is no home folder, as for a container's user that nobody has entered.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given)
    try:
        return Path("~/.cache").expanduser()
    except RuntimeError:
        raise OSError("there is no home folder") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block succeeds.

    The folder is made if need be. The temporary file keeps the suffix, which tells image
    libraries the format.

    Raises:
        OSError: the file cannot be written, an older one is left as it was; or ``path`` is there
            and no regular file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # renaming would do away with a pipe or a device
        raise OSError(f"{path} is no regular file")
    # not the whole stem: file systems take names of 255 bytes
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.stem[:50]}.", suffix=path.suffix, dir=path.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, atomically; where the file system has no links, a copy.

    Raises:
        OSError: neither can be done; an older ``target`` is left as it was.
    """
    temporary = target.with_name(f".link.{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:
        with replacing(target) as copy:
            shutil.copyfile(source, copy)
    finally:
        temporary.unlink(missing_ok=True)  # renaming one name of a file to another does nothing


def _flush_to_disk(path: Path) -> None:
    """Without this a power cut could leave the new name with none of its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    with _UMASK:  # two threads at once would leave 0 behind
        mask = os.umask(0)
        os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file opened for reading; pipes and devices are refused before they are waited for.

    Raises:
        ValueError: no regular file.
        OSError: it is not there or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, largest: int) -> bytes:
    """A regular file's content; see :func:`open_regular`.

    Raises:
        ValueError: no regular file, or more than ``largest`` bytes.
        OSError: it is not there or cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path} has more than the {largest} bytes that such a file may have")
    return content


def read_json(path: str | Path, largest: int = LARGEST_TEXT) -> Any:
    """The value of a JSON file; see :func:`read_bytes`.

    Raises:
        ValueError: also: no JSON, or nested too deep.
        OSError: it is not there or cannot be read.
    """
    content = read_bytes(path, largest)
    try:
        value = json.loads(content)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return value


def read_yaml(path: str | Path, largest: int = LARGEST_TEXT) -> Any:
    """The value of a YAML file of plain types, without aliases; see :func:`read_bytes`.

    Raises:
        ValueError: also: no YAML, nested too deep, or with aliases, which let a small file grow.
        OSError: it is not there or cannot be read.
    """
    content = read_bytes(path, largest)
    try:
        value = yaml.load(content, _NoAliases)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None
    except (yaml.YAMLError, *_OF_CONSTRUCTORS) as error:
        raise ValueError(f"{path} is no YAML that can be read: {error}") from None
    return value


class _NoAliases(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def _check_depth(value: Any) -> None:
    """Raise unless a parsed value is small enough to walk through."""
    nodes = 0
    level = [value]
    for _ in range(_DEEPEST):
        following: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                following += each.values()
            elif isinstance(each, list):
                following += each
            nodes += 1
            if nodes + len(following) > _MOST_NODES:
                raise ValueError(f"it holds more than {_MOST_NODES} values")
        if not following:
            return
        level = following
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def write_arrays(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], protocol: str, *, compress: bool = False
) -> None:
    """Write an npz file, atomically, with a text that says what the numbers depend on.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    save: Any = np.savez_compressed if compress else np.savez
    with replacing(path) as temporary, temporary.open("wb") as file:
        save(file, format=np.array(_ARRAYS_FORMAT), protocol=np.array(protocol), **arrays)


def read_kept_arrays(
    path: str | Path, protocol: str, largest: int = LARGEST_ARRAYS
) -> dict[str, NDArray[Any]] | None:
    """What :func:`write_arrays` wrote under this very protocol; None: it was under another.

    Raises:
        ValueError: as :func:`read_arrays`.
        OSError: it cannot be read.
    """
    found = read_arrays(path, largest)
    said = str(found.pop("format", None)), str(found.pop("protocol", None))
    return found if said == (str(_ARRAYS_FORMAT), protocol) else None


def check_array(name: str, array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless type and shape are these and all numbers finite."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} of {array.dtype}, not {shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")


def read_arrays(path: str | Path, largest: int = LARGEST_ARRAYS) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file by name: numbers and text, never objects; checksums are checked.

    NumPy's own reader believes the sizes that a file states: a few bytes can ask for terabytes.

    Raises:
        ValueError: no regular file, no npz file, damaged, or more than ``largest`` bytes, inflated.
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > largest:
                raise ValueError(f"it holds more than {largest} bytes")
            return {
                member.filename.removesuffix(".npy"): _read_array(archive, member)
                for member in archive.infolist()
            }
    except _OF_ARCHIVES as error:
        raise ValueError(f"{path} is damaged or no npz file: {error}") from None


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        shape, order, dtype = _array_header(file)
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not as large as it says")
        array: NDArray[Any] = np.empty(shape, dtype, order)
        flat: Any = array.reshape(-1, order="A")
        content = flat.view(np.uint8) if array.size else bytearray()
        read = cast(io.BufferedIOBase, file).readinto(content)
        # one byte more than there is: the checksum is compared at the end of the file only
        if read != len(content) or file.read(1):
            raise ValueError(f"{member.filename} is cut short")
    return array


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], Any, np.dtype[Any]]:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array has another format than 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"an array holds {dtype}")
    return shape, "F" if fortran else "C", dtype
