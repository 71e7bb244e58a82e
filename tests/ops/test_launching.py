"""What reaches the CUDA driver, with a driver that only records."""
# ruff: noqa: N802 - the driver's names

import contextlib
import ctypes
import enum
import struct
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nvae.ops import cuda
from nvae.ops.cuda import CompileError, CudaLauncher, DeviceLimits, Launch


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeDriver(ModuleType):
    """As much of cuda.bindings.driver as the launcher calls."""

    CUresult = Result
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.context = 0
        self.calls: list[tuple[Any, ...]] = []
        self.load_status = self.launch_status = Result.CUDA_SUCCESS

    def cuCtxGetCurrent(self) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, self.context

    def cuDeviceGet(self, index: int) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, 100 + index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, 1000 + device

    def cuCtxSetCurrent(self, context: int) -> tuple[Result]:
        self.context = context
        return (Result.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image: bytes) -> tuple[Result, str]:
        self.calls.append(("load", image))
        return self.load_status, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Result, str]:
        return Result.CUDA_SUCCESS, f"{module}.{name.decode()}"

    def cuFuncSetAttribute(self, function: str, attribute: int, value: int) -> tuple[Result]:
        self.calls.append(("shared", value))
        return (Result.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function: str, *rest: int) -> tuple[Result]:
        pointers = ctypes.cast(rest[8], ctypes.POINTER(ctypes.c_void_p))
        arguments = ctypes.string_at(pointers[0] or 0, 8 * 2 + 8)
        self.calls.append(("launch", function, rest[:8], arguments, rest[9]))
        return (self.launch_status,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.driver = fake  # type: ignore[attr-defined]
    for name, module in (("cuda", package), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    limits = DeviceLimits(90, 132, 232448, 233472)
    monkeypatch.setattr(cuda, "_device_limits", lambda _: limits)
    monkeypatch.setattr(cuda, "compile_kernel", lambda *key: repr(key).encode())
    cuda._load.cache_clear()
    yield fake
    cuda._load.cache_clear()


DEVICE = torch.device("cuda", 3)


def test_launch(driver: FakeDriver) -> None:
    """Grid, block, shared memory, the current stream, and the packed arguments."""
    x = torch.zeros(4)
    launch = Launch("k", (("A", 1),), 5, 64, 4096, (x, None), struct.pack("2i", 8, 9))
    CudaLauncher().launch(DEVICE, launch)
    CudaLauncher().launch(DEVICE, launch)
    loaded, shared, *launches = driver.calls
    assert loaded == ("load", repr(("k", (("A", 1),), 90)).encode())
    assert shared == ("shared", 4096)
    arguments = struct.pack("2P2i", x.data_ptr(), 0, 8, 9)
    assert (
        launches == [("launch", "module.kernel", (5, 1, 1, 64, 1, 1, 4096, 77), arguments, 0)] * 2
    )  # loaded once, launched twice


def test_streams_count_their_blocks_apart(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches of two streams may run at once; the slot stands between pointers and scalars."""
    launch = Launch("k", (), 1, 32, 0, (torch.zeros(1),), struct.pack("2i", 8, 9), counts=True)
    launcher, slots = CudaLauncher(), []
    for stream, device in ((77, 3), (78, 3), (77, 3), (77, 4)):
        current = SimpleNamespace(cuda_stream=stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, s=current: s)
        launcher.launch(torch.device("cuda", device), launch)
        _, slot, first, second = struct.unpack("P q 2i", driver.calls[-1][3])
        assert (first, second) == (8, 9)
        slots.append(slot)
    assert slots == [0, 1, 0, 0]
    assert {launcher.slot(3, stream) for stream in range(200)} == set(range(cuda.COUNTER_SLOTS))


def test_thread_without_a_context_gets_the_devices(driver: FakeDriver) -> None:
    """Threads of autograd may reach the launch before they call the CUDA runtime."""
    launch = Launch("k", (), 1, 32, 0, (torch.zeros(1), None), bytes(8))
    CudaLauncher().launch(DEVICE, launch)
    assert driver.context == 1000 + 100 + 3
    driver.context = 42
    CudaLauncher().launch(DEVICE, launch)
    assert driver.context == 42


def test_driver_errors_are_raised(driver: FakeDriver) -> None:
    """An image of the wrong architecture counts as a failed compilation, a launch's does not."""
    launch = Launch("k", (), 1, 32, 0, (torch.zeros(1), None), bytes(8))
    driver.load_status = Result.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(CompileError, match=r"does not load .*CUDA_ERROR_NO_BINARY_FOR_GPU"):
        CudaLauncher().launch(DEVICE, launch)
    driver.load_status = Result.CUDA_SUCCESS
    driver.launch_status = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError, match="CUDA driver: CUDA_ERROR_ILLEGAL_ADDRESS"):
        CudaLauncher().launch(DEVICE, launch)
