"""Whether a device has kernels: found out once, by running one, and never with a crash."""

import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nvae.ops import bn_swish, cuda, depthwise_conv2d, library
from nvae.ops.cuda import CompileError, CudaLauncher, DeviceLimits, Launch
from nvae.ops.library import check_kernels, has_kernels, where_possible
from nvae.ops.probe import find_fault

from .host import HostLauncher
from .test_launching import FakeDriver, Result, driver  # noqa: F401 - a fixture

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_working_device_has_no_fault(host: HostLauncher) -> None:
    assert find_fault(CPU, host) is None
    assert len(host.launches) == 1


def test_tracing_does_not_disturb_the_probe(host: HostLauncher) -> None:
    """Asked by a compiler, under tensors without storage, autocast or inference mode."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        assert find_fault(CPU, host) is None
    with torch.inference_mode():
        assert find_fault(CPU, host) is None


def test_wrong_result_is_a_fault(host_folder: Path) -> None:
    def swapped(name: str, source: str) -> str:
        changed = source.replace("expf(-", "expf(2 * -")
        assert changed != source, name
        return changed

    fault = find_fault(CPU, HostLauncher(host_folder, edit=swapped))
    assert fault is not None
    assert fault.startswith("a kernel gave a wrong result (off by ")


class Failing:
    """A launcher that fails in one way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def limits(self, device: torch.device) -> DeviceLimits:
        return DeviceLimits(90, 132, 232448, 233472)

    def launch(self, device: torch.device, launch: Launch) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), "out of memory"),
        (CompileError("vectors (-DELEM=32):\nerror: no such thing"), "error: no such thing"),
        (RuntimeError("Failed to dlopen libcuda.so.1"), "libcuda.so.1"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_whatever_a_launcher_raises_is_one_line(error: Exception, words: str) -> None:
    fault = find_fault(CPU, Failing(error))
    assert fault is not None
    assert words in fault
    assert "\n" not in fault


def test_old_gpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_device_limits", lambda _: DeviceLimits(75, 40, 65536, 65536))
    assert find_fault(CPU, CudaLauncher()) == "compute capability 7.5 is below 8.0"


def test_every_stage_of_the_driver(driver: FakeDriver) -> None:  # noqa: F811
    """Loading and launching through the real launcher, on a driver that fails."""
    driver.context = 1
    driver.load_status = Result.CUDA_ERROR_NO_BINARY_FOR_GPU
    fault = find_fault(CPU, CudaLauncher())
    assert fault is not None
    assert "CUDA_ERROR_NO_BINARY_FOR_GPU" in fault
    assert "update it" in fault
    driver.load_status = Result.CUDA_SUCCESS
    driver.launch_status = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    assert find_fault(CPU, CudaLauncher()) == "CUDA driver: CUDA_ERROR_ILLEGAL_ADDRESS"
    driver.launch_status = Result.CUDA_SUCCESS  # but it computes nothing
    assert str(find_fault(CPU, CudaLauncher())).startswith("a kernel gave a wrong result")


def test_missing_packages_say_what_to_install(
    driver: FakeDriver,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the fixture's own compiler
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(cuda, "_device_limits", lambda _: DeviceLimits(90, 1, 1 << 16, 1 << 16))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda._version.cache_clear()
    cuda._load.cache_clear()
    fault = find_fault(CPU, CudaLauncher())
    assert fault is not None
    assert fault.endswith("pip install cuda-bindings")


def test_unknown_architecture_says_what_to_update(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        cuda._version()
    except CompileError as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    with pytest.raises(CompileError, match="does not know sm_999: update"):
        cuda.compile_kernel("vectors", (("ELEM", 32),), 999)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU passes for a GPU whose probe fails; devices that were probed."""
    probed: list[int] = []

    def fail(device: torch.device) -> str:
        time.sleep(0.05)  # long enough for other threads to ask
        probed.append(device.index)
        return "no NVRTC"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(library, "find_fault", fail)
    monkeypatch.setattr(library, "_not_applicable", lambda *_: None)
    monkeypatch.setattr(cuda, "_warned", set())
    library._fault.cache_clear()
    yield probed
    library._fault.cache_clear()


def test_probed_once_a_device_by_many_threads(faults: list[int]) -> None:
    """They get the same answer, and the user one line, for all devices."""
    found: list[bool] = []

    def ask(index: int) -> None:
        found.append(has_kernels(torch.device("cuda", index)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=ask, args=(n % 2,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [False] * 8
    assert sorted(faults) == [0, 1]
    (warning,) = caught
    assert "plain PyTorch takes their place" in str(warning.message)
    assert "no NVRTC" in str(warning.message)
    assert "\n" not in str(warning.message)


def test_training_goes_on_without_kernels(faults: list[int]) -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(3, 1, 3, 3)
    with pytest.warns(RuntimeWarning, match="CUDA kernels are off"):
        y = depthwise_conv2d(x, w)
    assert torch.equal(y, depthwise_conv2d(x, w, impl="reference"))
    assert faults == [0]


def test_reference_probes_nothing(faults: list[int]) -> None:
    x, v = torch.randn(2, 3, 5, 5), torch.ones(3)
    depthwise_conv2d(x, torch.randn(3, 1, 3, 3), impl="reference")
    bn_swish(x, v, v, impl="reference")
    check_kernels("reference", GPU)
    assert faults == []


def test_insisting_on_kernels_is_one_line(faults: list[int]) -> None:
    check_kernels("auto", GPU)
    check_kernels("auto", CPU)
    with pytest.raises(ValueError, match="kernels=cuda: no NVRTC; kernels=auto goes on without"):
        check_kernels("cuda", GPU)
    with pytest.raises(ValueError, match=r"kernels=cuda needs an NVIDIA GPU.*is cpu"):
        check_kernels("cuda", CPU)
    with pytest.raises(ValueError, match="kernels=triton is unknown; allowed: auto"):
        check_kernels("triton", GPU)


def test_ops_over_many_tensors_ask_for_the_first_ones_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The optimizer's and the weight normalization's arguments begin with a list."""
    run = where_possible(lambda *_: "kernel", lambda *_: "formula")
    asked = []

    def no(device: torch.device) -> bool:
        asked.append(device)
        return False

    monkeypatch.setattr(library, "has_kernels", no)
    assert run([torch.zeros(1)], torch.zeros(2, device="meta")) == "formula"
    assert run(torch.zeros(2, device="meta")) == "formula"
    assert [device.type for device in asked] == ["cpu", "meta"]
