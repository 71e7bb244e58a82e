"""CUDA C++ compiled at first use, kept in a cache on disk, and launched through the driver.

PyTorch's CUDA builds bring NVRTC and ``cuda.bindings``; neither nvcc nor a host compiler nor a GPU
is needed to compile. Launches go to PyTorch's current stream.
"""

import ctypes
import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from nvae.files import user_cache

OPTIONS = ("--std=c++17", "--ftz=true", "--extra-device-vectorization")
CACHE_VARIABLE = "NVAE_CACHE_DIR"
LONGEST_TURN = 120.0
"""Seconds to wait for another process that compiles the same kernel, which takes it a few."""
COUNTER_SLOTS = 64
"""Streams of a device whose launches may sum at the same time; see :class:`CudaLauncher`."""
_warned: set[str] = set()


class CompileError(RuntimeError):
    """A kernel could not be compiled or loaded: what failed, and what to do where that is known."""


def warn_once(key: str, message: str) -> None:
    """Warn, but not at every step."""
    if key not in _warned:
        _warned.add(key)
        # by a place that is no file: a line of source would follow, and says nothing here
        warnings.warn_explicit(message, RuntimeWarning, "nvae.ops", 0)


def kernel_source(name: str) -> str:
    """Text of the kernel ``name`` (a file here, without ``.cu``) with its common part."""
    folder = resources.files("nvae.ops")
    return "".join((folder / f"{part}.cu").read_text() for part in ("common", name))


def compile_kernel(name: str, macros: tuple[tuple[str, int], ...], arch: int) -> bytes:
    """Machine code of a kernel, from the cache where it has been compiled before.

    Of many processes that start at once one compiles, and the others read what it has written.
    Where the cache cannot be used, a warning says so once and everyone compiles.

    Args:
        name: the kernel's file here, without ``.cu``.
        macros: its compile-time constants.
        arch: compute capability times ten: 80, 90, 100.

    Raises:
        CompileError: no NVRTC, or the compiler refuses.
    """
    source = kernel_source(name)
    options = (f"--gpu-architecture=sm_{arch}", *OPTIONS, *(f"-D{k}={v}" for k, v in macros))
    key = hashlib.sha256("\0".join((source, *options, _version())).encode()).hexdigest()
    try:
        path = cache_folder() / f"{name}-{key[:40]}.cubin"
    except OSError as error:
        _warn_of_cache(str(error))
        return _compile(source, name, options)
    code = _read(path)
    if code is None:
        with _turn(path):
            code = _read(path)  # another process may have made it meanwhile
            if code is None:
                code = _compile(source, name, options)
                _write(path, code)
    return code


def cache_folder() -> Path:
    """``$NVAE_CACHE_DIR``, else ``nvae/kernels`` in the user's cache directory.

    Raises:
        OSError: the variable is not set, and the user has no home folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return user_cache() / "nvae" / "kernels"


def _warn_of_cache(reason: str) -> None:
    warn_once(
        "cache",
        f"compiled CUDA kernels are not kept for another start ({reason}): set {CACHE_VARIABLE} to "
        "a folder that can be written",
    )


def _read(path: Path) -> bytes | None:
    """The cached code, or None where there is none or its checksum is off (a disk was full)."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Inside, no other process or thread compiles what will be stored as ``path``.

    Only a saving: where there can be no lock, or its holder takes too long, all go on.
    """
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + LONGEST_TURN
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        lock.unlink(missing_ok=True)  # whoever waits for it has it open
        os.close(descriptor)  # which gives it to the next


def _write(path: Path, code: bytes) -> None:
    """Store atomically. A folder that cannot be written costs time at the next start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError as error:
        _warn_of_cache(f"{path.parent}: {error.strerror or error}")
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:
        _warn_of_cache(f"{path.parent}: {error.strerror or error}")
        Path(temporary).unlink(missing_ok=True)


def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(
            f"cuda.bindings with NVRTC is not installed ({error}): pip install cuda-bindings"
        ) from error
    module: ModuleType = nvrtc
    return module


@cache
def _version() -> str:
    nvrtc = _nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings are there, the library is not
        raise CompileError(
            f"NVRTC does not load ({error}): install nvidia-cuda-nvrtc for CUDA "
            f"{torch.version.cuda}, the one that torch was built with"
        ) from error
    return f"nvrtc {major}.{minor}"


def _compile(source: str, name: str, options: tuple[str, ...]) -> bytes:
    nvrtc = _nvrtc()
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS
    status, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    if status != success:
        raise CompileError(f"{name}: {status}")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != success:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            text = log.decode(errors="replace").strip("\0 \n")
            if "--gpu-architecture" in text:
                arch = options[0].partition("=")[2]
                raise CompileError(
                    f"NVRTC ({_version()}) does not know {arch}: update cuda-bindings and "
                    "nvidia-cuda-nvrtc, or torch, which brings both"
                )
            raise CompileError(f"{name} ({' '.join(options)}): {status}\n{text}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        code = b" " * size
        nvrtc.nvrtcGetCUBIN(program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@dataclass(frozen=True)
class DeviceLimits:
    """What tilings depend on.

    Attributes:
        arch: compute capability times ten.
        multiprocessors: their number.
        shared_per_block: bytes of shared memory a block may ask for.
        shared_per_multiprocessor: bytes of shared memory its blocks share.
    """

    arch: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name of the kernel's file, without ``.cu``.
        macros: its compile-time constants.
        blocks: number of blocks.
        threads: threads of a block.
        shared: bytes of dynamic shared memory.
        tensors: what the pointers at the head of the kernel's ``Args`` point to; None is null.
        scalars: the rest of ``Args``, packed.
        counts: whether the kernel knows the last of its blocks, for which it has to be told which
            of its counters are free: behind the pointers its ``Args`` has a slot.
    """

    kernel: str
    macros: tuple[tuple[str, int], ...]
    blocks: int
    threads: int
    shared: int
    tensors: tuple[Tensor | None, ...]
    scalars: bytes
    counts: bool = False

    def arguments(self, slot: int = 0) -> bytes:
        """The kernel's ``Args`` structure.

        Args:
            slot: of the counters, below :data:`COUNTER_SLOTS`. Launches that may run at the same
                time have different ones.
        """
        addresses = [0 if t is None else t.data_ptr() for t in self.tensors]
        counters = struct.pack("q", slot) if self.counts else b""
        return struct.pack(f"{len(addresses)}P", *addresses) + counters + self.scalars


class Launcher(Protocol):
    """Runs launches. Besides :class:`CudaLauncher` the tests have one that runs on the CPU."""

    def limits(self, device: torch.device) -> DeviceLimits:
        """Limits of the device that tensors on ``device`` are computed on."""
        ...

    def launch(self, device: torch.device, launch: Launch) -> None:
        """Enqueue. Freed tensors are safe: their memory is reused in the stream's order."""
        ...


class CudaLauncher:
    """Launches on the current stream of a CUDA device. Safe under CUDA graph capture, once the
    kernel has been loaded (a warm-up step, as capture asks for anyway).

    Kernels that sum count their blocks in memory of their own, which is zero between launches.
    Each stream has its counters, up to :data:`COUNTER_SLOTS` streams of a device; beyond them, some
    share. A captured launch keeps those of the stream it was captured on, so graphs captured on one
    stream must not be replayed at the same time.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int | None, int], int] = {}
        self._assigning = threading.Lock()

    def slot(self, index: int | None, stream: int) -> int:
        """Of the counters that launches on a stream of device ``index`` use."""
        known = self._slots.get((index, stream))
        if known is None:
            with self._assigning:
                taken = sum(device == index for device, _ in self._slots)
                known = self._slots.setdefault((index, stream), taken % COUNTER_SLOTS)
        return known

    def limits(self, device: torch.device) -> DeviceLimits:
        """See :class:`Launcher`."""
        return _device_limits(device.index)

    def launch(self, device: torch.device, launch: Launch) -> None:
        """See :class:`Launcher`.

        Raises:
            CompileError: the kernel does not compile.
        """
        driver = _driver()
        with torch.cuda.device(device):
            _ensure_context(device.index)
            function = _load(
                device.index, launch.kernel, launch.macros, self.limits(device).arch, launch.shared
            )
            stream = torch.cuda.current_stream(device).cuda_stream
            arguments = launch.arguments(self.slot(device.index, stream))
            structure = ctypes.create_string_buffer(arguments, len(arguments))
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
            grid, block = (launch.blocks, 1, 1), (launch.threads, 1, 1)
            pointer = ctypes.addressof(parameters)
            result = driver.cuLaunchKernel(
                function, *grid, *block, launch.shared, stream, pointer, 0
            )
        _check(result)


def _ensure_context(index: int) -> None:
    """Make the device's context current. In a thread of autograd that has not called the CUDA
    runtime yet, PyTorch has chosen a device, but the driver knows of no context.
    """
    driver = _driver()
    if int(_check(driver.cuCtxGetCurrent())) == 0:
        context = _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(index))))
        _check(driver.cuCtxSetCurrent(context))


@cache
def _device_limits(index: int) -> DeviceLimits:
    # not every version of torch declares all of these
    properties: Any = torch.cuda.get_device_properties(index)
    return DeviceLimits(
        arch=properties.major * 10 + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_per_block=properties.shared_memory_per_block_optin,
        shared_per_multiprocessor=properties.shared_memory_per_multiprocessor,
    )


@cache
def _load(
    device: int, kernel: str, macros: tuple[tuple[str, int], ...], arch: int, shared: int
) -> Any:
    """The loaded kernel; modules belong to a device's context and live as long as the process."""
    driver = _driver()
    code = compile_kernel(kernel, macros, arch)
    try:
        module = _check(driver.cuModuleLoadData(code))
        function = _check(driver.cuModuleGetFunction(module, b"kernel"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, shared))
    except RuntimeError as error:
        raise CompileError(
            f"the compiled kernel does not load ({error}): the driver may be too old for this "
            "NVRTC; update it, or install torch for an older CUDA"
        ) from error
    return function


def _driver() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CompileError(
            f"cuda.bindings is not installed ({error}): pip install cuda-bindings"
        ) from error
    module: ModuleType = driver
    return module


def _check(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != _driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return values[0] if values else None
