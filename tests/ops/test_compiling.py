"""The kernel cache on disk, and what happens where there is no compiler."""

import errno
import fcntl
import multiprocessing
import os
import pwd
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.ops import cuda, depthwise_conv2d, library
from nvae.ops.cuda import CompileError, compile_kernel
from tests import PATIENCE

MACROS = (("ELEM", 32), ("VIO", 1), ("MODE", 1), ("THREADS", 256), ("WIDE", 1))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    try:
        cuda._version()
    except CompileError as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    monkeypatch.setenv("NVAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cuda, "_compile", refuse)


def test_second_use_reads_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile_kernel("vectors", MACROS, 90)
    assert code.startswith(b"\x7fELF")
    forbid_compiling(monkeypatch)
    assert compile_kernel("vectors", MACROS, 90) == code
    with pytest.raises(AssertionError, match="compiled again"):  # another architecture
        compile_kernel("vectors", MACROS, 80)


def test_changed_source_is_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_kernel("vectors", MACROS, 90)
    source = cuda.kernel_source("vectors")
    monkeypatch.setattr(cuda, "kernel_source", lambda _: source + "\n// edited")
    forbid_compiling(monkeypatch)
    with pytest.raises(AssertionError, match="compiled again"):
        compile_kernel("vectors", MACROS, 90)


@pytest.mark.parametrize("damage", [b"", b"half a file"])
def test_damaged_file_is_replaced(cache: Path, damage: bytes) -> None:
    """A full disk or a killed copy must not be loaded into a GPU."""
    code = compile_kernel("vectors", MACROS, 90)
    (stored,) = cache.iterdir()
    stored.write_bytes(damage)
    assert compile_kernel("vectors", MACROS, 90) == code
    assert stored.stat().st_size == len(code) + 32


def test_folder_that_cannot_be_made_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """A home that belongs to somebody else, or one that is mounted for reading."""
    monkeypatch.setattr(cuda, "_warned", set())
    monkeypatch.delenv("NVAE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"not kept.*directory.*: set NVAE_CACHE_DIR") as caught:
        assert compile_kernel("vectors", MACROS, 90).startswith(b"\x7fELF")
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        compile_kernel("vectors", MACROS, 90)


def test_read_only_cache_is_read_and_not_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = compile_kernel("vectors", MACROS, 90)

    def read_only(*_: object, **__: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cuda, "_warned", set())
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(cuda.tempfile, "mkstemp", read_only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile_kernel("vectors", MACROS, 90) == code
    with pytest.warns(RuntimeWarning, match=r"not kept .*Read-only file system"):
        assert compile_kernel("vectors", MACROS, 80)
    assert len(list(cache.iterdir())) == 1


def test_user_that_nobody_has_entered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container under another number: no HOME, no line in /etc/passwd."""

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "NVAE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "_warned", set())
    with pytest.warns(RuntimeWarning, match="no home folder.*: set NVAE_CACHE_DIR"):
        assert compile_kernel("vectors", MACROS, 90).startswith(b"\x7fELF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    compile_kernel("vectors", MACROS, 90)
    assert len(list((cache / "nvae" / "kernels").iterdir())) == 1


def _start(folder: str, results: "multiprocessing.Queue[bytes]") -> None:
    os.environ["NVAE_CACHE_DIR"] = folder
    results.put(compile_kernel("vectors", MACROS, 90))


def test_many_processes_at_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One compiles, all get the same code, and neither lock nor temporary file stays behind."""
    real = cuda._compile

    def counted(*arguments: Any) -> bytes:
        with (tmp_path / "compiled").open("a") as file:
            file.write(".")
        return real(*arguments)

    monkeypatch.setattr(cuda, "_compile", counted)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_start, args=(str(cache), results)) for _ in range(6)]
    for process in processes:
        process.start()
    codes = {results.get(timeout=PATIENCE) for _ in processes}
    for process in processes:
        process.join()
    assert len(codes) == 1
    (stored,) = cache.iterdir()
    assert stored.suffix == ".cubin"
    assert (tmp_path / "compiled").read_text() == "."


def test_holder_of_the_lock_that_hangs_holds_up_nobody(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_kernel("vectors", MACROS, 90)
    (stored,) = cache.iterdir()
    stored.unlink()
    monkeypatch.setattr(cuda, "LONGEST_TURN", 0.1)
    with stored.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert compile_kernel("vectors", MACROS, 90).startswith(b"\x7fELF")


def test_compiler_message_is_kept(cache: Path) -> None:
    with pytest.raises(CompileError, match=r"(?s)vectors .*sm_90.*THREADS.*undefined"):
        compile_kernel("vectors", (("ELEM", 32), ("VIO", 1), ("MODE", 1)), 90)


def test_failed_kernel_warns_once_and_computes_its_formula() -> None:
    """Registered under another name, with the CPU standing in for the GPU."""

    def broken(*_: object) -> torch.Tensor:
        raise CompileError("no such luck")

    run = library.kernel_or_formula("test_broken", broken, lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match="test_broken runs without its CUDA kernel: no such"):
        assert run(torch.zeros(1)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(torch.zeros(1)) == 1


class FakeCuda:
    """As much of a CUDA tensor as the dispatch looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> None:
        self.dtype = dtype
        self.channels_last = channels_last

    def numel(self) -> int:
        return 1

    def is_contiguous(self, memory_format: torch.memory_format) -> bool:
        return self.channels_last


def test_auto_takes_the_kernel_only_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "_unavailable", lambda *_: None)
    use = library.use_kernel
    assert use("auto", FakeCuda())  # type: ignore[arg-type]
    assert not use("reference", FakeCuda())  # type: ignore[arg-type]
    assert not use("auto", FakeCuda(torch.float64))  # type: ignore[arg-type]
    assert not use("auto", FakeCuda(channels_last=False))  # type: ignore[arg-type]
    assert use("cuda", FakeCuda(channels_last=False))  # type: ignore[arg-type]
    assert not use("auto", FakeCuda(), 13)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel size 13 is above 11"):
        use("cuda", FakeCuda(), 13)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        use("cuda", FakeCuda(torch.float64))  # type: ignore[arg-type]


@pytest.fixture
def gpu_without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU whose probe finds no compiler."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "_not_applicable", lambda *_: None)
    monkeypatch.setattr(library, "_fault", lambda _: "NVRTC is not installed")
    monkeypatch.setattr(cuda, "_warned", set())


@pytest.mark.usefixtures("gpu_without_compiler")
def test_no_compiler_warns_once_and_uses_the_reference() -> None:
    x, w = torch.randn(1, 3, 5, 5), torch.randn(3, 1, 3, 3)
    with pytest.warns(RuntimeWarning, match="CUDA kernels are off.*: NVRTC is not installed"):
        depthwise_conv2d(x, w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depthwise_conv2d(x, w)
    with pytest.raises(ValueError, match="impl='cuda' does not apply: NVRTC is not installed"):
        depthwise_conv2d(x, w, impl="cuda")


@pytest.mark.usefixtures("gpu_without_compiler")
def test_no_compiler_does_not_break_the_graph() -> None:
    x, w = torch.randn(1, 3, 5, 5), torch.randn(3, 1, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match="CUDA kernels are off"):
        torch.testing.assert_close(compiled(x, w), depthwise_conv2d(x, w, impl="reference"))


def test_choosing_the_kernel_does_not_break_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "_not_applicable", lambda *_: None)
    monkeypatch.setattr(library, "_fault", lambda _: None)
    x = torch.randn(1, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    w = torch.randn(3, 1, 3, 3)
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x, w: depthwise_conv2d(x, w, impl="cuda"), fullgraph=True, backend=keep)(
        x, w
    )
    assert "nvae.depthwise" in graphs[0].code
