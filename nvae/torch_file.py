"""Files of `torch.save`, checked before and while they are read.

``torch.load(weights_only=True)`` runs nothing that a file contains, but it believes what the file
says of itself: it compares no checksum, reads a tensor beyond the end of its record, takes packed
bytes for plain ones, and unpacks a pickle of any size. So a file is looked through first. Its table
of contents is checked, its pickle is read with a description in place of every tensor, and the
records that are wanted are compared with their checksums. Only then torch opens the file.
"""

import argparse
import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nvae.files import open_regular

LARGEST_PICKLE = 1 << 27
"""Bytes of what describes a file's tensors; a checkpoint with 10,000 of them has 2 MiB."""

_DEEPEST_TUPLE = 20
_PIECE = 1 << 20
_ITEM_SIZES = {
    f"{name}Storage": dtype.itemsize
    for name, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
        "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
        "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip


class TorchFileError(ValueError):
    """A file that is missing, damaged, not of `torch.save`, or not to be trusted; one line."""


class _Refused(Exception):  # noqa: N818
    """The file asks for something that could run code."""


class StoredTensor(NamedTuple):
    """What stands in a file's structure in a tensor's place.

    Attributes:
        record: of the archive, which holds the tensor's storage.
        shape: of the tensor.
    """

    record: str
    shape: tuple[int, ...]


class _Storage(NamedTuple):
    record: str
    numel: int


def read_torch_file(path: Path, entries: Collection[str] | None = None) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote to a file: tensors on the CPU, and plain types.

    Args:
        path: of the file.
        entries: keys to read, where they are there; None: all. What is read is compared with its
            checksums, and nothing else is read: tensors are mapped from the file.

    Raises:
        TorchFileError: see there.
    """
    structure = inspect_torch_file(path, entries)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: content[key] for key in structure}
    except Exception as error:  # torch raises almost anything
        raise TorchFileError(f"{path} is damaged or no checkpoint: {_reason(error)}") from None


def inspect_torch_file(path: Path, entries: Collection[str] | None = None) -> dict[str, Any]:
    """What :func:`read_torch_file` reads, with a :class:`StoredTensor` for every tensor.

    Raises:
        TorchFileError: see there.
    """
    try:
        open_regular(path).close()
    except ValueError as error:
        raise TorchFileError(str(error)) from None
    except OSError as error:
        raise TorchFileError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        with _archive(path) as archive:
            records = _table_of_contents(archive, path)
            structure = _structure(archive, records)
            if entries is not None:
                structure = {key: structure[key] for key in entries if key in structure}
            needed = {tensor.record for tensor in stored_tensors(structure)}
            for name, record in records.items():
                if entries is None or name in needed or not name.startswith("data/"):
                    _check_sum(archive, record)
    except _Refused as error:
        raise TorchFileError(f"{path} is refused: {error}") from None
    except Exception as error:  # zipfile and pickle raise almost anything on damaged files
        raise TorchFileError(f"{path} is damaged or no checkpoint: {_reason(error)}") from None
    return structure


def stored_tensors(structure: Any) -> Iterator[StoredTensor]:
    """All tensors of a structure, however deep."""
    waiting, seen = [structure], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, argparse.Namespace):
            waiting.append(vars(value))
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def _archive(path: Path) -> zipfile.ZipFile:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            "it is no archive as torch 1.6 and later write them (older files have no checksums: "
            "load and save them again with torch)"
        )
    return zipfile.ZipFile(path)


def _table_of_contents(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The records by name, without the folder that all of them are in.

    Raises:
        ValueError: two of one name, packed ones, or more bytes than the file has.
    """
    infos = archive.infolist()
    pickles = [each for each in infos if each.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it does not have one data.pkl")
    folder = pickles[0].filename.removesuffix("data.pkl")
    records = {each.filename.removeprefix(folder): each for each in infos}
    if len(records) < len(infos):
        raise ValueError("two of its records have one name")
    for each in infos:
        if each.compress_type != zipfile.ZIP_STORED or each.compress_size != each.file_size:
            raise ValueError(f"its record {each.filename} is packed; torch writes them plain")
    if sum(each.file_size for each in infos) > path.stat().st_size:
        raise ValueError("its records overlap")
    if records["data.pkl"].file_size > LARGEST_PICKLE:
        raise ValueError(f"its data.pkl has more than {LARGEST_PICKLE} bytes")
    return records


def _check_sum(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Raise a ValueError unless the record's bytes have its checksum."""
    try:
        with archive.open(record) as file:
            while file.read(_PIECE):
                pass
    except (zipfile.BadZipFile, EOFError):
        raise ValueError(f"the checksum of {record.filename} is wrong") from None


def _structure(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]) -> dict[str, Any]:
    content = archive.read(records["data.pkl"])
    _check_tuples(content)
    structure = _Describer(content, records).load()
    if not isinstance(structure, dict):
        raise ValueError("it does not hold a dictionary")
    if not all(isinstance(key, str) for key in structure):
        raise ValueError("a key of its dictionary is no text")
    return structure


class _Describer(pickle.Unpickler):
    """Reads a pickle of torch's with descriptions in place of tensors; calls nothing else."""

    def __init__(self, content: bytes, records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(content))
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _ITEM_SIZES:
            return _ITEM_SIZES[name]
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(
                f"it asks for {module}.{name}, which could run code; nothing was run. "
                "Checkpoints hold tensors and plain types only"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, item_size, key, _, numel = pid
        record = f"data/{key}"
        # torch would read on into the next record
        if kind != "storage" or self._records[record].file_size != numel * item_size:
            raise ValueError(f"{record} is not as long as its tensors")
        return _Storage(record, numel)


def _describe(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> StoredTensor:
    """In place of `torch._utils._rebuild_tensor_v2`.

    Raises:
        ValueError: the tensor leads out of its storage.
    """
    numbers = (offset, *shape, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(stride):
        raise ValueError("the shape of a tensor is impossible")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(f"a tensor leads out of {storage.record}")
    return StoredTensor(storage.record, tuple(shape))


def _same(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _describe,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
}


def _check_tuples(content: bytes) -> None:
    """Raise a ValueError for tuples nested so deep that Python crashes when it hashes them."""
    stack: list[int] = []  # how deep each value on the unpickler's stack is; -1 for a mark
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(content):
        name = code.name
        if name.startswith("TUPLE"):
            taken = _above_mark(stack) if name == "TUPLE" else _take(stack, int(name[5:]))
            depth = 1 + max(taken, default=0)
            if depth > _DEEPEST_TUPLE:
                raise ValueError(f"it nests tuples more than {_DEEPEST_TUPLE} deep")
            stack.append(depth)
        elif name == "MARK":
            stack.append(-1)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, 0))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        else:
            before = [each.name for each in code.stack_before]
            if "mark" in before:
                _above_mark(stack)
                before = before[: before.index("mark")]
            _take(stack, len(before))
            stack += [0] * len(code.stack_after)


def _take(stack: list[int], count: int) -> list[int]:
    if count > len(stack):
        raise ValueError("its data.pkl is damaged")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _above_mark(stack: list[int]) -> list[int]:
    taken = []
    while (depth := stack.pop()) != -1:
        taken.append(depth)
    return taken


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
