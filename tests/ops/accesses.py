"""Which addresses the warps of a kernel touch: conflicts between banks, bytes of global memory.

The kernel runs on the CPU (host_shim.h, built with LOG). Lanes of a warp are taken to be together
where they execute an instruction for the n-th time since the last barrier; on a GPU, lanes that
skipped a turn of a loop may be behind.
"""

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nvae.ops.cuda import Launch

from .host import HostLauncher, compiler

BANKS, WORD, SECTOR, WARP = 32, 4, 32, 32
RECORD = np.dtype(
    [
        ("address", "u8"), ("site", "u4"), ("epoch", "u4"), ("thread", "u2"), ("size", "u1"),
        ("is_store", "u1"), ("unused", "u4"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """What one instruction did.

    Attributes:
        line: its line of the source.
        is_store: a store, or a load.
        size: bytes of a lane's access.
        tensor: index of the launch's tensor it touched, or None for shared memory.
        warps: how often a warp executed it.
        degree: the most passes that shared memory needed for one of its phases (a warp of 4-byte
            accesses, half a warp of 8-byte or a quarter of 16-byte ones); 1 is free of conflicts.
        sectors: 32-byte sectors of global memory that the warps asked for.
        needed: bytes that their lanes asked for.
    """

    line: str
    is_store: bool
    size: int
    tensor: int | None
    warps: int
    degree: int
    sectors: int
    needed: int


class LoggingLauncher(HostLauncher):
    """Runs the first blocks of every launch and records what they touch in :attr:`sites`.

    Args:
        most_blocks: blocks to run; the outputs of the others are left as they are.
    """

    # a structure is moved by one instruction, as on the device
    optimization = ("-O1", "-g", "-fPIC", "-fno-tree-sra", "-DLOG")

    def __init__(self, *args: object, most_blocks: int = 2, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.most_blocks = most_blocks
        self.sites: dict[str, list[Site]] = {}

    def launch(self, device: torch.device, launch: Launch) -> None:
        self.launches.append(launch)
        binary = self._build(launch)
        library = ctypes.CDLL(str(binary))
        blocks = min(launch.blocks, self.most_blocks)
        assert library.run(launch.arguments(), blocks, launch.threads, int(self.descending), 0) == 0
        count, begin, end = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()
        library.records.restype = ctypes.c_void_p
        start = library.records(ctypes.byref(count), ctypes.byref(begin), ctypes.byref(end))
        raw = ctypes.string_at(start, count.value * RECORD.itemsize)
        records = np.frombuffer(raw, RECORD)
        self.sites[launch.kernel] = _sites(records, (begin.value, end.value), launch, binary)

    def _compile(self, path: Path, binary: Path, flags: list[str]) -> None:
        """Linked without the sanitizer, whose hooks the shim defines."""
        made = binary.with_suffix(".o")
        gxx = compiler() or "g++"
        for command in (
            [gxx, *flags, "-fsanitize=thread", "-c", str(path), "-o", str(made)],
            [gxx, "-shared", str(made), "-o", str(binary)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)


def _sites(
    records: np.ndarray, shared: tuple[int, int], launch: Launch, binary: Path
) -> list[Site]:
    tensor = np.full(len(records), -2)
    tensor[(records["address"] >= shared[0]) & (records["address"] < shared[1])] = -1
    for i, t in enumerate(launch.tensors):
        if t is not None:
            at = t.data_ptr()
            inside = (records["address"] >= at) & (
                records["address"] < at + t.numel() * t.element_size()
            )
            tensor[inside] = i
    keep = tensor > -2  # the rest are arguments and variables of the block
    records, tensor = records[keep], tensor[keep]
    groups = _warp_accesses(records)
    lines = _lines(binary, np.unique(records["site"]))
    found = []
    for site in np.unique(records["site"]):
        for which in np.unique(tensor[records["site"] == site]):
            mine = (records["site"] == site) & (tensor == which)
            r, g = records[mine], groups[mine]
            size = int(r["size"][0])
            touched = np.stack([g, r["address"] // SECTOR])
            found.append(
                Site(
                    lines[int(site)], bool(r["is_store"][0]), size,
                    None if which < 0 else int(which), len(np.unique(g)),
                    _degree(r, g, size) if which < 0 else 0,
                    np.unique(touched, axis=1).shape[1] if which >= 0 else 0, size * len(r),
                )
            )  # fmt: skip
    return found


def _warp_accesses(records: np.ndarray) -> np.ndarray:
    """For every record the number of the warp's access that it is part of."""
    keys = [records[name].astype(np.int64) for name in ("epoch", "site", "thread")]
    order = np.lexsort((np.arange(len(records)), *keys[::-1]))
    sequence = np.stack(keys)[:, order]
    starts = np.flatnonzero(np.r_[True, (sequence[:, 1:] != sequence[:, :-1]).any(0)])
    turn = np.empty(len(records), np.int64)  # how often the lane has been here since the barrier
    lengths = np.diff(np.r_[starts, len(records)])
    turn[order] = np.arange(len(records)) - np.repeat(starts, lengths)
    epoch, site, thread = keys
    rows = np.stack([epoch, site, thread // WARP, turn])
    return np.unique(rows, axis=1, return_inverse=True)[1].reshape(-1)


def _degree(records: np.ndarray, groups: np.ndarray, size: int) -> int:
    """Most different words of one bank in one phase."""
    lanes = WARP * WORD // max(size, WORD)
    phase = records["thread"] % WARP // lanes
    words = np.arange(max(1, size // WORD))
    word = records["address"].astype(np.int64)[:, None] // WORD + words
    rows = np.stack([np.repeat(groups, len(words)), np.repeat(phase, len(words)), word.ravel()])
    rows = np.unique(rows, axis=1)
    rows[2] %= BANKS
    return int(np.unique(rows, axis=1, return_counts=True)[1].max())


def _lines(binary: Path, sites: np.ndarray) -> dict[int, str]:
    """The source line of every return address."""
    source = binary.with_suffix(".cpp").read_text().splitlines()
    command = ["addr2line", "-e", str(binary), *(hex(int(s) - 1) for s in sites)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = [line.split()[0].rpartition(":") for line in text.splitlines()]
    return {
        int(site): source[int(n) - 1].strip() if file.endswith(".cpp") and n.isdigit() else file
        for site, (file, _, n) in zip(sites, numbers, strict=True)
    }
