"""Kernel launches on PyTorch's current stream, through the CUDA driver."""

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from nvae.ops.compiler import CompileError, compile_kernel


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
    """

    kernel: str
    macros: tuple[tuple[str, int], ...]
    blocks: int
    threads: int
    shared: int
    tensors: tuple[Tensor | None, ...]
    scalars: bytes

    def arguments(self) -> bytes:
        """The kernel's ``Args`` structure."""
        addresses = [0 if t is None else t.data_ptr() for t in self.tensors]
        return struct.pack(f"{len(addresses)}P", *addresses) + self.scalars


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
    """

    def limits(self, device: torch.device) -> DeviceLimits:
        """See :class:`Launcher`."""
        return _device_limits(device.index)

    def launch(self, device: torch.device, launch: Launch) -> None:
        """See :class:`Launcher`.

        Raises:
            CompileError: the kernel does not compile.
        """
        from cuda.bindings import driver

        with torch.cuda.device(device):
            _ensure_context(device.index)
            function = _load(
                device.index, launch.kernel, launch.macros, self.limits(device).arch, launch.shared
            )
            arguments = launch.arguments()
            structure = ctypes.create_string_buffer(arguments, len(arguments))
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
            stream = torch.cuda.current_stream(device).cuda_stream
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
    from cuda.bindings import driver

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
    from cuda.bindings import driver

    module = _check(driver.cuModuleLoadData(compile_kernel(kernel, macros, arch)))
    function = _check(driver.cuModuleGetFunction(module, b"kernel"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared))
    return function


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = result
    if status in (
        driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,
        driver.CUresult.CUDA_ERROR_INVALID_IMAGE,
    ):
        raise CompileError(f"the compiled kernel does not load: {status.name}")
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status.name}")
    return values[0] if values else None
