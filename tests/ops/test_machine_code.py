"""What the kernels compile to, per architecture: registers, spills, wide loads. No GPU needed."""

import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvae.ops import kernels
from nvae.ops.cuda import CompileError, DeviceLimits, Launch, compile_kernel

LIMITS = {
    80: DeviceLimits(80, 108, 166912, 167936),
    90: DeviceLimits(90, 132, 232448, 233472),
    100: DeviceLimits(100, 148, 232448, 233472),
}
REGISTERS_A_MULTIPROCESSOR = 65536
IS_NEW_COMPILER = [int(n) for n in (torch.version.cuda or "0").split(".")] >= [13, 2]
MOST_SPILLED = 32 if IS_NEW_COMPILER else 0
"""Bytes of stack a thread. CUDA 13.2's compiler keeps up to six registers of two kernels there:
24 bytes of ``bn_swish`` for sm_100, 16 of ``depthwise_backward`` in float32 for sm_80."""


def tool() -> Path:
    """cuobjdump of Triton's wheel."""
    try:
        compile_kernel("vectors", (("ELEM", 32), ("VIO", 1), ("THREADS", 256)), 90)
    except CompileError as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("Triton's wheel, which carries cuobjdump, is not installed")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        pytest.skip(f"Triton's wheel has no {path.name}")
    return path


class Recorder:
    """A launcher that only remembers: tensors on the meta device, whose addresses are 0."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[Launch] = []

    def limits(self, device: torch.device) -> DeviceLimits:
        return LIMITS[self.arch]

    def launch(self, device: torch.device, launch: Launch) -> None:
        self.launches.append(launch)


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def recorded(
    arch: int, shape: tuple[int, ...], k: int, s: int, dtype: torch.dtype, fused: bool
) -> list[Launch]:
    """The launches of a forward and a backward pass."""
    recorder = Recorder(arch)
    c = shape[1]
    x, weight = images(shape, dtype), torch.empty(c, 1, k, k, device="meta")
    vector = torch.empty(c, device="meta")
    bn = (vector, vector, torch.empty(3, c, dtype=torch.float64, device="meta"))
    tracking = (1e-5, vector.clone(), vector.clone(), 1.0, 0.05)
    y, sums, _ = kernels.depthwise_forward(
        x, weight, s, bn if fused else None, fused, launcher=recorder
    )
    if fused:
        kernels.depthwise_forward(x, weight, s, bn, True, tracking, recorder)
    kernels.depthwise_backward(
        y, x, weight, s, bn if fused else None, (y, sums) if fused else None, launcher=recorder
    )
    if fused:
        for swish in (False, True):
            kernels.bn_forward(x, bn, swish, recorder)
            kernels.bn_backward(x, x, bn, swish, launcher=recorder)
        kernels.channel_sums(x, recorder)
        kernels.channel_moments(x, tracking, recorder)
        kernels.moments(sums, None, 2.0, tracking, recorder)
        kernels.fold(x, x, sums, recorder)
    return recorder.launches


@cache
def disassemble(
    binary: Path, kernel: str, macros: tuple[tuple[str, int], ...], arch: int, folder: Path
) -> tuple[int, int, int, list[str]]:
    """Registers, stack bytes, local bytes and the opcodes."""
    path = folder / "kernel.cubin"
    path.write_bytes(compile_kernel(kernel, macros, arch))

    command = [str(binary), "-res-usage", "-sass", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage is not None
    line = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    opcodes = re.findall(line, text, re.MULTILINE)
    registers, stack, local = (int(n) for n in usage.groups())
    return registers, stack, local, opcodes


def sums_of(macros: dict[str, int]) -> bool:
    """Whether a kernel sums over blocks."""
    if "COLUMNS" in macros:
        return macros["MODE"] in (kernels.BN_MODES["MODE_BACKWARD"], kernels.BN_MODES["MODE_SUMS"])
    return bool(
        macros.get("SUMS") or macros.get("NEED_DW") or (macros.get("FUSED") and "NEED_DX" in macros)
    )


BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
CONFIGURATIONS = [
    *((arch, (32, 1536, 16, 16), 5, 1, BFLOAT, 1) for arch in LIMITS),
    *((arch, (200, 1536, 4, 4), 5, 1, FLOAT, 1) for arch in (80, 100)),
    (90, (16, 120, 32, 32), 3, 1, BFLOAT, 0),
    (90, (16, 7, 16, 16), 5, 1, BFLOAT, 1),
]
MORE = [
    (90, (16, 768, 32, 32), 5, 1, BFLOAT, 0),
    (90, (4, 90, 64, 64), 5, 1, BFLOAT, 1),
    (100, (8, 90, 8, 8), 5, 1, HALF, 1),
    (90, (16, 128, 32, 32), 5, 2, BFLOAT, 1),
    (90, (16, 128, 16, 16), 11, 1, BFLOAT, 1),
]
CONFIGURATIONS += [pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE]


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: "-".join(map(str, c)))
def test_machine_code(configuration: tuple, tmp_path: Path) -> None:
    """Registers under the cap that residency needs, local memory, 16-byte loads."""
    binary = tool()
    arch, shape, k, s, dtype, fused = configuration
    vector_bytes = 16
    while shape[1] % (vector_bytes // dtype.itemsize):
        vector_bytes //= 2
    for launch in recorded(arch, shape, k, s, dtype, bool(fused)):
        if launch.kernel == "vectors":
            continue
        macros = dict(launch.macros)
        registers, stack, local, opcodes = disassemble(
            binary, launch.kernel, launch.macros, arch, tmp_path
        )
        blocks = macros.get("MIN_BLOCKS", kernels.BN_BLOCKS)
        cap = min(255, REGISTERS_A_MULTIPROCESSOR // (launch.threads * blocks) // 8 * 8)
        assert registers <= cap, launch
        assert (stack <= MOST_SPILLED, local) == (True, 0), launch
        if not stack:
            assert not [o for o in opcodes if o.startswith(("LDL", "STL"))], launch
        width = {16: ".128", 8: ".64", 4: "", 2: ".U16"}[vector_bytes]
        copied = launch.kernel == "depthwise_forward" and vector_bytes > 2
        load = "LDGSTS.E" if copied else "LDG.E"
        loads = [o for o in opcodes if o.startswith(load) and f"{width}." in f"{o}."]
        assert loads, (launch, vector_bytes)
        if vector_bytes == 16 and launch.kernel.startswith("depthwise"):
            assert "STS.128" in opcodes
        if sums_of(macros):  # what is written before the count is visible after it
            assert [o for o in opcodes if o.startswith("MEMBAR") and o.endswith("GPU")], launch
            assert [o for o in opcodes if o.startswith("ATOM")], launch
        if launch.kernel == "depthwise_forward" and arch == 100:
            assert any(o.startswith("FFMA2") for o in opcodes), "two channels an instruction"


@pytest.mark.slow
def test_most_instructions_of_the_main_loop_are_the_convolution(tmp_path: Path) -> None:
    """The tuned kernels stay near their multiply-adds: 25 an output forward, 50 backward.

    Counted up to the sums of all blocks: a patch of 4x4 outputs of two channels, and one of 2x4
    whose two gradients take as many.
    """
    binary = tool()
    forward, backward = (
        next(x for x in recorded(90, (32, 1536, 16, 16), 5, 1, BFLOAT, True) if x.kernel == name)
        for name in ("depthwise_forward", "depthwise_backward")
    )
    for launch in (forward, backward):
        opcodes = disassemble(binary, launch.kernel, launch.macros, 90, tmp_path)[3]
        opcodes = opcodes[: next(i for i, o in enumerate(opcodes) if o.startswith("MEMBAR"))]
        products = [o for o in opcodes if o.startswith("FFMA")]
        assert len(products) >= 800
        assert len(opcodes) < 2.8 * 800, launch.kernel


def test_every_kernel_compiles_for_every_architecture() -> None:
    """Also where the tools that read machine code are missing."""
    tool()
    for arch in LIMITS:
        for launch in recorded(arch, (2, 24, 9, 9), 5, 1, FLOAT, True):
            assert compile_kernel(launch.kernel, launch.macros, arch)
