"""CUDA C++ to machine code at first use, with NVRTC, kept in a cache on disk.

PyTorch's CUDA builds bring NVRTC and ``cuda.bindings``; neither nvcc nor a host compiler nor a GPU
is needed to compile.
"""

import hashlib
import os
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType

OPTIONS = ("--std=c++17", "--ftz=true", "--extra-device-vectorization")
CACHE_VARIABLE = "NVAE_CACHE_DIR"


class CompileError(RuntimeError):
    """A kernel could not be compiled; the message holds the compiler's own."""


def kernel_source(name: str) -> str:
    """Text of the kernel ``name`` (a file here, without ``.cu``) with its common part."""
    folder = resources.files("nvae.ops")
    return "".join((folder / f"{part}.cu").read_text() for part in ("common", name))


def compile_kernel(name: str, macros: tuple[tuple[str, int], ...], arch: int) -> bytes:
    """Machine code of a kernel, from the cache where it has been compiled before.

    Safe when many processes start at once: each writes a file of its own and moves it into place.

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
    path = cache_folder() / f"{name}-{key[:40]}.cubin"
    code = _read(path)
    if code is None:
        code = _compile(source, name, options)
        _write(path, code)
    return code


def cache_folder() -> Path:
    """``$NVAE_CACHE_DIR``, else ``nvae/kernels`` in the user's cache directory."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "nvae" / "kernels"


def _read(path: Path) -> bytes | None:
    """The cached code, or None where there is none or its checksum is off (a disk was full)."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Store atomically. A folder that cannot be written costs time at the next start, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CompileError(f"cuda.bindings with NVRTC is not installed ({error})") from error
    module: ModuleType = nvrtc
    return module


@cache
def _version() -> str:
    nvrtc = _nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings are there, the library is not
        raise CompileError(f"NVRTC does not load ({error})") from error
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
            raise CompileError(f"{name} ({' '.join(options)}): {status}\n{text}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        code = b" " * size
        nvrtc.nvrtcGetCUBIN(program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)
