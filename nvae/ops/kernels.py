"""The kernels as functions of tensors: allocate, choose constants, launch.

Every function takes a launcher last, computes in float32 and, where tensors are large, in the
storage type of its input. Images are made channels_last, parameters float32, where they are not.
"""

import struct

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from nvae.ops.cuda import COUNTER_SLOTS, CompileError, CudaLauncher, Launch, Launcher
from nvae.ops.tiling import Shape, Tiling, backward_tiling, channel_blocks, forward_tiling

CUDA = CudaLauncher()
DTYPES = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 17}  # ELEM in common.cu
MAX_BLOCKS = 2**31 - 1
BN_CHANNELS = 64
BN_THREADS = 256
BN_BLOCKS = 4  # blocks of a multiprocessor: 64 registers a thread let four be resident
BN_COLUMNS = 256  # blocks side by side that one compiled kernel has counters for
VECTOR_THREADS = 256

BatchNormVectors = tuple[Tensor, Tensor, Tensor]
"""gamma, beta ``(C,)`` float; moments ``(3, C)`` float64: mean, rstd, var."""
Elements = tuple[Tensor | None, float]
"""How many elements a layer's sums are over: on the device, else the number itself; 0 where moments
are constants, through which no gradient goes."""
Tracking = tuple[float, Tensor | None, Tensor | None, float, float]
"""eps; running mean and variance ``(C,)`` float32 to be moved, or None; how often an element counts
in that variance; momentum."""


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    stride: int,
    bn: BatchNormVectors | None = None,
    want_sums: bool = False,
    tracking: Tracking | None = None,
    launcher: Launcher = CUDA,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = conv(x) or conv(Swish(BN(x))), with ``want_sums`` sums ``(2, C)`` of y (else empty), and
    with ``tracking`` moments ``(3, C)`` of y (else empty).

    Args:
        x: ``(B, C, H, W)``.
        weight: ``(C, 1, K, K)``.
        stride: 1 or 2.
        bn: what to normalize with, or None.
        want_sums: whether to sum.
        tracking: of the layer that y goes to; with ``want_sums``.
        launcher: where to run.
    """
    x, weight, shape = nhwc(x), _vector(weight), _shape(x, weight, stride)
    tiling = forward_tiling(shape, launcher.limits(x.device), x.element_size())
    y = like(x, shape.b, shape.c, *shape.out)
    rows = tiling.grid[3]
    partial = _floats(x, rows, 2, shape.c) if want_sums else None
    sums = doubles(x, 2, shape.c) if want_sums else None
    made = doubles(x, 3, shape.c) if tracking is not None else None
    running, scalars = _tracking(tracking)
    flags = {
        "FUSED": int(bn is not None), "SUMS": int(want_sums), "MOMENTS": int(made is not None),
    }  # fmt: skip
    _launch_depthwise(
        "depthwise_forward", shape, tiling, [x, y],
        [x, weight, *_bn(bn), y, partial, sums, made, *running], scalars, flags, 1, launcher,
    )  # fmt: skip
    _moved(running)
    return y, doubles(x, 0) if sums is None else sums, doubles(x, 0) if made is None else made


def depthwise_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    bn: BatchNormVectors | None = None,
    through_sums: tuple[Tensor, Tensor] | None = None,
    need_dx: bool = True,
    need_dw: bool = True,
    elements: Elements = (None, 0.0),
    launcher: Launcher = CUDA,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`depthwise_forward`: dx, dw ``(C, 1, K, K)``, with ``bn`` those of gamma
    and beta ``(2, C)`` and, where ``elements`` says so, those of x's sums ``(2, C)`` float64.

    dx holds nothing through the moments. What is not needed is empty.

    Args:
        dy: gradient of y.
        x: the raw input.
        weight: as in the forward pass.
        stride: as in the forward pass.
        bn: as in the forward pass.
        through_sums: y and the gradient of its sums, where there is one.
        need_dx: whether to compute dx (and what comes with ``bn``).
        need_dw: whether to compute dw.
        elements: of the layer that normalizes x.
        launcher: where to run.
    """
    x, dy, weight = nhwc(x), nhwc(dy.to(x.dtype)), _vector(weight)
    shape = _shape(x, weight, stride)
    tiling = backward_tiling(shape, launcher.limits(x.device), x.element_size())
    rows = tiling.grid[3]
    y, dsums = through_sums if through_sums is not None else (None, None)
    y = None if y is None else nhwc(y)
    dsums = None if dsums is None else dsums.double().contiguous()
    dx = torch.empty_like(x) if need_dx else None
    partial_weight = _floats(x, rows, shape.c, shape.k**2) if need_dw else None
    dw = _floats(x, *weight.shape) if need_dw else None
    has_sums = need_dx and bn is not None
    partial_sums = _floats(x, rows, 2, shape.c) if has_sums else None
    sums = doubles(x, 2, shape.c) if has_sums else None
    params = _floats(x, 2, shape.c) if has_sums else None
    through, count, n = _through(x, elements) if has_sums else (None, None, 0.0)

    def launch(dx: Tensor | None, dw: Tensor | None, slices: int) -> None:
        flags = {
            "FUSED": int(bn is not None),
            "DSUMS": int(dsums is not None),
            "NEED_DX": int(dx is not None),
            "NEED_DW": int(dw is not None),
        }
        _launch_depthwise(
            "depthwise_backward", shape, tiling, [x, dy, y, dx],
            [
                dy, y, dsums, x, weight, *_bn(bn), dx, partial_weight, partial_sums, dw, sums,
                params, through, count,
            ],
            struct.pack("d", n), flags, slices, launcher,
        )  # fmt: skip

    if shape.k <= 5:
        if need_dx or need_dw:
            launch(dx, dw, 1)
    else:  # more weights than registers: one gradient a kernel, one row of taps a block
        if dx is not None:
            launch(dx, None, 1)
        if dw is not None:
            launch(None, dw, shape.k)
    return (
        like(x, 0, 1, 1, 1) if dx is None else dx,
        _floats(x, 0) if dw is None else dw,
        _floats(x, 0) if params is None else params,
        doubles(x, 0) if through is None else through,
    )


def bn_forward(x: Tensor, bn: BatchNormVectors, swish: bool, launcher: Launcher = CUDA) -> Tensor:
    """BN(x), or Swish(BN(x))."""
    x = nhwc(x)
    y = torch.empty_like(x)
    _launch_bn("MODE_APPLY", x, launcher, bn=bn, out=y, swish=swish)
    return y


def bn_backward(
    dy: Tensor, x: Tensor, bn: BatchNormVectors, swish: bool, elements: Elements = (None, 0.0),
    launcher: Launcher = CUDA,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (nothing through the moments), gradients of gamma and beta ``(2, C)`` and, where
    ``elements`` says so (else empty), of x's sums ``(2, C)`` float64."""
    x, dy = nhwc(x), nhwc(dy.to(x.dtype))
    dx, params = torch.empty_like(x), _floats(x, 2, x.shape[1])
    through, count, n = _through(x, elements)
    _launch_bn(
        "MODE_BACKWARD", x, launcher, dy=dy, bn=bn, out=dx, swish=swish,
        gradients=(params, through, count), n=n,
    )  # fmt: skip
    return dx, params, doubles(x, 0) if through is None else through


def channel_sums(x: Tensor, launcher: Launcher = CUDA) -> Tensor:
    """Sum and sum of squares of every channel, ``(2, C)`` float64."""
    sums = _launch_bn("MODE_SUMS", nhwc(x), launcher)
    assert sums is not None
    return sums


def channel_moments(
    x: Tensor, tracking: Tracking, launcher: Launcher = CUDA
) -> tuple[Tensor, Tensor]:
    """:func:`channel_sums` and the :func:`moments` of x alone."""
    x, made = nhwc(x), doubles(x, 3, x.shape[1])
    sums = _launch_bn("MODE_SUMS", x, launcher, made=made, tracking=tracking)
    assert sums is not None
    return sums, made


def fold(dx: Tensor, x: Tensor, dsums: Tensor, launcher: Launcher = CUDA) -> Tensor:
    """dx + dS1 + 2 dS2 x."""
    x, dx = nhwc(x), nhwc(dx.to(x.dtype))
    out = torch.empty_like(x)
    _launch_bn("MODE_FOLD", x, launcher, dy=dx, dsums=dsums.double().contiguous(), out=out)
    return out


def moments(
    sums: Tensor, elements: Tensor | None, n: float, tracking: Tracking, launcher: Launcher = CUDA
) -> Tensor:
    """Sums ``(2, C)`` over n (or ``elements``) to ``(3, C)``: mean, rstd, biased variance; float64.

    The running statistics move towards them; see :func:`nvae.ops.reference.track`.
    """
    c = sums.shape[1]
    out = doubles(sums, 3, c)
    running, scalars = _tracking(tracking)
    wide = [None if t is None else t.double().contiguous() for t in (sums, elements)]
    macros = (("ELEM", 32), ("VIO", 1), ("THREADS", VECTOR_THREADS))
    blocks = -(-c // VECTOR_THREADS)
    launch = Launch(
        "vectors", macros, blocks, VECTOR_THREADS, 0, (*wide, out, *running),
        struct.pack("d", n) + scalars + struct.pack("i", c),
    )  # fmt: skip
    launcher.launch(sums.device, launch)
    _moved(running)
    return out


def _tracking(tracking: Tracking | None) -> tuple[list[Tensor | None], bytes]:
    """The running statistics and the numbers that the kernels take."""
    eps, mean, var, repeats, momentum = tracking or (0.0, None, None, 0.0, 0.0)
    for running in (mean, var):
        if running is not None and not (running.dtype == torch.float32 and running.is_contiguous()):
            raise CompileError(f"no kernel for running statistics of {running.dtype}")
    return [mean, var], struct.pack("2df", eps, repeats, momentum)


def _moved(running: list[Tensor | None]) -> None:
    """Tell autograd, which does not see what a kernel writes."""
    increment_version([t for t in running if t is not None])


def _through(x: Tensor, elements: Elements) -> tuple[Tensor | None, Tensor | None, float]:
    """Room for the gradient of x's sums, where there is one, and the elements for the kernel."""
    count, n = elements
    if count is None and not n:
        return None, None, 0.0
    return doubles(x, 2, x.shape[1]), None if count is None else count.double().contiguous(), n


def _launch_depthwise(
    kernel: str,
    shape: Shape,
    tiling: Tiling,
    images: list[Tensor | None],
    tensors: list[Tensor | None],
    numbers: bytes,
    flags: dict[str, int],
    slices: int,
    launcher: Launcher,
) -> None:
    _, _, units, rows = tiling.grid
    device, dtype = images[0].device, images[0].dtype  # type: ignore[union-attr]
    macros = {
        "ELEM": DTYPES[dtype], "VIO": _vector_width(shape.c, images),
        "C": shape.c, "H": shape.h, "W": shape.w, "K": shape.k, "S": shape.s,
        **tiling.macros(), "COUNTER_SLOTS": COUNTER_SLOTS, **flags,
    }  # fmt: skip
    scalars = numbers + struct.pack("3i", shape.b, units, rows)
    scalars += bytes(-len(scalars) % 8)
    blocks = channel_blocks(shape.c, tiling.channels) * rows * slices
    assert blocks <= MAX_BLOCKS
    launch = Launch(
        kernel,
        tuple(macros.items()),
        blocks,
        tiling.threads,
        tiling.shared,
        tuple(tensors),
        scalars,
        counts=True,
    )
    launcher.launch(device, launch)


def _launch_bn(
    mode: str,
    x: Tensor,
    launcher: Launcher,
    *,
    dy: Tensor | None = None,
    bn: BatchNormVectors | None = None,
    dsums: Tensor | None = None,
    out: Tensor | None = None,
    swish: bool = False,
    made: Tensor | None = None,
    tracking: Tracking | None = None,
    gradients: tuple[Tensor | None, ...] = (None, None, None),
    n: float = 0.0,
) -> Tensor | None:
    if x.dtype not in DTYPES:
        raise CompileError(f"no kernel for {x.dtype}")
    c = x.shape[1]
    pixels = x.numel() // c
    columns = channel_blocks(c, BN_CHANNELS)
    vio = _vector_width(c, [x, dy, out])
    step = 4 * BN_THREADS * vio // BN_CHANNELS  # pixels of a block's thread groups, four times
    wanted = launcher.limits(x.device).multiprocessors * BN_BLOCKS
    run = max(step, -(-pixels * columns // (wanted * step)) * step)
    rows = -(-pixels // run)
    assert run * c < 2**31
    has_sums = mode in ("MODE_BACKWARD", "MODE_SUMS")
    partial = _floats(x, rows, 2, c) if has_sums else None
    sums = doubles(x, 2, c) if has_sums else None
    running, numbers = _tracking(tracking)
    tensors = (x, dy, *_bn(bn), dsums, out, partial, sums, made, *running, *gradients)
    scalars = struct.pack("2qd", pixels, run, n) + numbers + struct.pack("2i4x", c, rows)
    macros = {
        "ELEM": DTYPES[x.dtype], "VIO": vio, "MODE": BN_MODES[mode],
        "SWISH": int(swish), "MOMENTS": int(made is not None),
        "CB": BN_CHANNELS, "THREADS": BN_THREADS,
        "MIN_BLOCKS": BN_BLOCKS, "COUNTER_SLOTS": COUNTER_SLOTS,
        "COLUMNS": max(BN_COLUMNS, 1 << (columns - 1).bit_length()),
    }  # fmt: skip
    blocks = columns * rows
    launch = Launch(
        "bn_swish", tuple(macros.items()), blocks, BN_THREADS, 0, tensors, scalars, counts=True
    )
    launcher.launch(x.device, launch)
    _moved(running)
    return sums


BN_MODES = {"MODE_APPLY": 0, "MODE_BACKWARD": 1, "MODE_SUMS": 2, "MODE_FOLD": 3}


def _shape(x: Tensor, weight: Tensor, stride: int) -> Shape:
    b, c, h, w = x.shape
    return Shape(b, c, h, w, weight.shape[-1], stride)


def nhwc(x: Tensor) -> Tensor:
    """x in channels_last."""
    return x.contiguous(memory_format=torch.channels_last)


def _vector(parameter: Tensor) -> Tensor:
    return parameter.float().contiguous()


def _bn(bn: BatchNormVectors | None) -> list[Tensor | None]:
    if bn is None:
        return [None] * 3
    gamma, beta, moments = bn
    return [_vector(gamma), _vector(beta), moments.double().contiguous()]


def like(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """Uninitialized, channels_last, of x's type and device."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _floats(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def doubles(x: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """Uninitialized float64 on x's device."""
    return torch.empty(shape, dtype=torch.float64, device=x.device)


def _vector_width(c: int, images: list[Tensor | None]) -> int:
    """Elements of an access: up to 16 bytes, dividing C, every tensor aligned to it."""
    present = [t for t in images if t is not None]
    size = present[0].element_size()
    width = 16 // size
    while width > 1 and (c % width or any(t.data_ptr() % (width * size) for t in present)):
        width //= 2
    return width
