"""A launcher that compiles the kernels' source with g++ and runs it on the CPU."""

import ctypes
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from nvae.ops.cuda import DeviceLimits, Launch, kernel_source

SHIM = Path(__file__).with_name("host_shim.h")
H100 = DeviceLimits(90, 132, 232448, 233472)
SMALL = DeviceLimits(80, 2, 166912, 167936)  # few multiprocessors: a block walks over many units
ERRORS = {
    1: "divergent barrier",
    2: "misaligned access",
    3: "a copy never waited for",
    4: "an atomic operation without a fence before it",
    5: "memory written beside an atomic operation",
}


def compiler() -> str | None:
    """Path of g++, or None."""
    return shutil.which("g++")


class HostLauncher:
    """Runs launches on the CPU, tensors on the CPU too.

    Args:
        folder: where to keep what is compiled.
        limits: the device to pretend.
        edit: changes a kernel's source (a deliberate fault), by (name, source).
        descending: order of the threads between barriers.
        seed: of the order of the blocks; another one at every launch.
        sanitize: run each launch in a process of its own under the address and undefined behavior
            sanitizers, every tensor in an allocation of exactly its size.
    """

    optimization = ("-O1", "-fPIC", "-shared")

    def __init__(
        self,
        folder: Path,
        limits: DeviceLimits = SMALL,
        edit: Callable[[str, str], str] | None = None,
        descending: bool = False,
        seed: int = 1,
        sanitize: bool = False,
    ) -> None:
        self.folder = folder
        self.pretended = limits
        self.edit = edit
        self.descending = descending
        self.seed = seed
        self.sanitize = sanitize
        self.launches: list[Launch] = []

    def limits(self, device: torch.device) -> DeviceLimits:
        return self.pretended

    def launch(self, device: torch.device, launch: Launch) -> None:
        assert device.type == "cpu"
        self.launches.append(launch)
        binary = self._build(launch)
        if self.sanitize:
            self._run_process(binary, launch)
            return
        library = ctypes.CDLL(str(binary))
        for tensor in launch.tensors if launch.counts else ():
            if tensor is not None:
                library.watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(_bytes(tensor)))
        error = library.run(launch.arguments(), launch.blocks, launch.threads, *self._order())
        if error:
            raise RuntimeError(ERRORS[error])

    def _order(self) -> tuple[int, int]:
        """Of threads and of blocks."""
        return int(self.descending), self.seed * 1000 + len(self.launches)

    def _build(self, launch: Launch) -> Path:
        source = kernel_source(launch.kernel)
        if self.edit is not None:
            source = self.edit(launch.kernel, source)
        tail = "void start_kernel() { kernel(*static_cast<const Args*>(g_arguments)); }\n"
        text = f'#include "{SHIM}"\n{source}\n{tail}'
        flags = ["-std=c++17", "-w", f"-DSHARED_BYTES={launch.shared}"]
        flags += [f"-D{name}={value}" for name, value in launch.macros]
        if self.sanitize:
            text += SANITIZED_MAIN
            flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        else:
            flags += self.optimization
        key = hashlib.sha256("\0".join((text, SHIM.read_text(), *flags)).encode()).hexdigest()
        binary = self.folder / f"{launch.kernel}-{key[:24]}"
        if not binary.exists():
            path = binary.with_suffix(".cpp")
            path.write_text(text)
            self._compile(path, binary, flags)
        return binary

    def _compile(self, path: Path, binary: Path, flags: list[str]) -> None:
        command = [compiler() or "g++", *flags, str(path), "-o", str(binary)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def _run_process(self, binary: Path, launch: Launch) -> None:
        """File: pointers, scalar bytes, blocks, threads, orders; scalars; for each: size, data."""
        scalars = launch.arguments()[8 * len(launch.tensors) :]
        parts = [
            struct.pack(
                "6i", len(launch.tensors), len(scalars), launch.blocks, launch.threads,
                *self._order(),
            ),
            scalars,
        ]  # fmt: skip
        for tensor in launch.tensors:
            if tensor is None:
                parts.append(struct.pack("q", -1))
                continue
            parts.append(struct.pack("q", _bytes(tensor)))
            parts.append(ctypes.string_at(tensor.data_ptr(), _bytes(tensor)))
        path = self.folder / "launch.bin"
        path.write_bytes(b"".join(parts))
        done = subprocess.run(
            [str(binary), str(path)],
            capture_output=True,
            text=True,
            env={"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
        )
        if done.returncode:
            raise RuntimeError(done.stderr[:4000])
        data, offset = path.read_bytes(), 0
        for tensor in launch.tensors:
            if tensor is not None:
                ctypes.memmove(tensor.data_ptr(), data[offset:], _bytes(tensor))
                offset += _bytes(tensor)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


SANITIZED_MAIN = r"""
int main(int, char** argv) {
    FILE* file = fopen(argv[1], "rb");
    int header[6];
    if (!file || fread(header, sizeof(header), 1, file) != 1) fail("no launch");
    const int pointers = header[0];
    const size_t head = pointers * sizeof(void*);
    char* arguments = static_cast<char*>(malloc(head + header[1]));
    if (fread(arguments + head, 1, header[1], file) != size_t(header[1])) fail("no scalars");
    char** buffers = static_cast<char**>(calloc(pointers, sizeof(char*)));
    long long* sizes = static_cast<long long*>(calloc(pointers, sizeof(long long)));
    for (int i = 0; i < pointers; ++i) {
        if (fread(&sizes[i], 8, 1, file) != 1) fail("no size");
        if (sizes[i] < 0) continue;
        buffers[i] = static_cast<char*>(malloc(sizes[i]));
        if (fread(buffers[i], 1, sizes[i], file) != size_t(sizes[i])) fail("no data");
    }
    fclose(file);
    memcpy(arguments, buffers, head);
    if (run(arguments, header[2], header[3], header[4], header[5]))
        fail("barrier, alignment or fence");
    file = fopen(argv[1], "wb");
    for (int i = 0; i < pointers; ++i)
        if (sizes[i] > 0) fwrite(buffers[i], 1, sizes[i], file);
    fclose(file);
}
"""
