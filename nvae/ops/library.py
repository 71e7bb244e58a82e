"""The ops as PyTorch knows them (``torch.ops.nvae``), and which calls they take.

Each has a kernel (CUDA), a formula (CPU, and CUDA where the kernel does not compile) and a fake
(shapes, for tracing). They have no autograd of their own: the functions in front of them do.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nvae.command_line import brief
from nvae.ops import kernels, reference, weight_norm
from nvae.ops.adamax import adamax_cpu, adamax_formula, adamax_kernel
from nvae.ops.cuda import CompileError, warn_once
from nvae.ops.kernels import DTYPES, doubles, like, nhwc
from nvae.ops.probe import find_fault
from nvae.ops.tiling import MAX_KERNEL

Impl = Literal["auto", "reference", "cuda"]
IMPLS: tuple[str, ...] = get_args(Impl)
OPS = torch.ops.nvae
FORMULAS = SimpleNamespace()
"""What the ops of the same names compute without kernels, on any device, the CPU's own ways too."""
LIBRARY = torch.library.Library("nvae", "DEF")
ARGUMENTS = {
    "BN": "Tensor gamma, Tensor beta, Tensor moments",
    "ELEMENTS": "Tensor? elements, float n",
    "TRACKING": "float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, float repeats, "
    "float momentum",
}
"""Of several ops; see the types of :mod:`nvae.ops.kernels`."""
_probing = threading.Lock()
_assumed: ContextVar[bool | None] = ContextVar("_assumed", default=None)


@contextmanager
def assuming_kernels(available: bool) -> Iterator[None]:
    """Inside, GPUs have kernels, or none, whatever this machine has.

    For tracing with tensors that have no storage: nothing may be run with it. The layout is not
    asked for either, since without a GPU torch cannot tell that of a convolution's output.
    """
    token = _assumed.set(available)
    try:
        yield
    finally:
        _assumed.reset(token)


def use_kernel(impl: Impl, x: Tensor, kernel_size: int = 1) -> bool:
    """Whether the CUDA kernels take this call.

    Args:
        impl: ``auto`` asks for a CUDA tensor that is channels_last already, of a type and size the
            kernels know; ``cuda`` converts the layout.
        x: ``(B, C, H, W)``, the op's input.
        kernel_size: K of the convolution.

    Raises:
        ValueError: an unknown ``impl``, or ``cuda`` where no kernel applies.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return False
    reason = _not_applicable(x, kernel_size)
    if reason is None:
        reason = _unavailable(x.device.index, impl == "auto")
    if impl == "cuda":
        if reason is not None:
            raise ValueError(f"impl='cuda' does not apply: {reason}")
        return True
    return reason is None and (
        _kernels_assumed() is not None or x.is_contiguous(memory_format=torch.channels_last)
    )


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on a device that is there."""
    return device.type == "cuda" and _unavailable(device.index, True) is None


def will_take(impl: Impl, weight: Tensor) -> bool:
    """Whether kernels take a depthwise convolution with this weight ``(C, 1, K, K)``, so far as can
    be known before its input is.
    """
    if impl == "reference" or _not_applicable(weight, weight.shape[-1]) is not None:
        return False
    return has_kernels(weight.device)


def check_kernels(impl: str, device: torch.device) -> None:
    """Refuse a choice of kernels, the setting ``kernels``, that cannot be on this device.

    Raises:
        ValueError: one line: an unknown choice, or ``cuda`` where there are none, with the reason.
    """
    if impl not in IMPLS:
        raise ValueError(f"kernels={impl} is unknown; allowed: {', '.join(IMPLS)}")
    if impl != "cuda":
        return
    if device.type != "cuda":
        raise ValueError(
            f"kernels=cuda needs an NVIDIA GPU, but the device is {device.type}; kernels=auto "
            "works everywhere"
        )
    reason = _unavailable(device.index, False)
    if reason is not None:
        raise ValueError(f"kernels=cuda: {reason}; kernels=auto goes on without them")


def ops(impl: Impl) -> Any:
    """Where to call the registered ops from: ``reference`` compiles no kernel on any device."""
    return FORMULAS if impl == "reference" else OPS


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x as a convolution under autocast would take it."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _not_applicable(x: Tensor, kernel_size: int) -> str | None:
    if x.device.type != "cuda":
        return f"the kernels need an NVIDIA GPU, the input is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if kernel_size > MAX_KERNEL:
        return f"kernel size {kernel_size} is above {MAX_KERNEL}"
    if x.numel() == 0:
        return "the input is empty"
    return None


def _unavailable(device: int | None, warn: bool) -> str | None:
    """Why a device (None: the current one) has no kernels, or None.

    torch.compile runs it while tracing.
    """
    assumed = _kernels_assumed()
    if assumed is not None:
        return None if assumed else "assumed to be absent"
    if torch.version.cuda is None:
        return "the kernels need an NVIDIA GPU"
    with _probing:  # one thread probes, the others wait for what it finds
        reason = _fault(torch.cuda.current_device() if device is None else device)
    if reason is not None and warn:
        warn_once(
            "unavailable",
            f"CUDA kernels are off, plain PyTorch takes their place and is slower: {reason} "
            "(kernels=reference leaves them out without a word)",
        )
    return reason


def _kernels_assumed() -> bool | None:
    return _assumed.get()


# what torch.compiler.assume_constant_result does, without its import of a second and a half
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
_kernels_assumed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _fault(device: int) -> str | None:
    """What a device's probe finds, once a process."""
    return find_fault(torch.device("cuda", device))


def kernel_or_formula(
    name: str, kernel: Callable[..., Any], formula: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel; where it does not compile, a warning (once) and the formula."""

    def run(*args: Any) -> Any:
        try:
            return kernel(*args)
        except CompileError as error:
            warn_once(name, f"{name} runs without its CUDA kernel: {brief(error)}")
            return formula(*args)

    return run


def where_possible(launch: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    """``launch`` on devices with kernels, else the formula; a list may be the first argument."""

    def run(*args: Any) -> Any:
        return launch(*args) if has_kernels(_device_of(args)) else formula(*args)

    return run


def _device_of(args: tuple[Any, ...]) -> torch.device:
    first = args[0][0] if isinstance(args[0], list) else args[0]
    device: torch.device = first.device
    return device


def _define(
    schema: str,
    kernel: Callable[..., Any],
    formula: Callable[..., Any],
    fake: Callable[..., Any],
    on_cpu: Callable[..., Any] | None = None,
) -> None:
    def plain(*args: Any) -> Any:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return formula(*args)

    def without_kernels(*args: Any) -> Any:
        if on_cpu is not None and _device_of(args).type == "cpu":
            return on_cpu(*args)
        return plain(*args)

    bare = schema.partition("(")[0]
    name = f"nvae::{bare}"
    on_gpu = where_possible(kernel_or_formula(name, kernel, plain), plain)
    setattr(FORMULAS, bare, without_kernels)
    for short, arguments in ARGUMENTS.items():
        schema = schema.replace(short, arguments)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_gpu, "CUDA")
    LIBRARY.impl(name, on_cpu or plain, "CPU")
    torch.library.register_fake(name, fake, lib=LIBRARY)


def _out(x: Tensor, stride: int) -> Tensor:
    b, c, h, w = x.shape
    return like(x, b, c, (h + stride - 1) // stride, (w + stride - 1) // stride)


_define(
    "channel_sums(Tensor x) -> Tensor",
    kernels.channel_sums,
    reference.channel_sums,
    lambda x: doubles(x, 2, x.shape[1]),
)


def _moments_formula(
    sums: Tensor, elements: Tensor | None, n: float, eps: float, running_mean: Tensor | None,
    running_var: Tensor | None, repeats: float, momentum: float,
) -> Tensor:  # fmt: skip
    moments = reference.moments(sums, elements, n, eps)
    if running_mean is not None and running_var is not None:
        mean, _, var = moments
        reference.track(running_mean, running_var, mean, var, elements, n, repeats, momentum)
    return moments


def _channel_moments_formula(x: Tensor, *tracking: Any) -> tuple[Tensor, Tensor]:
    sums = reference.channel_sums(x)
    return sums, _moments_formula(sums, None, x.numel() / x.shape[1], *tracking)


def _pair_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return doubles(x, 2, x.shape[1]), doubles(x, 3, x.shape[1])


_define(
    "channel_moments(Tensor x, TRACKING) -> (Tensor, Tensor)",
    lambda x, *tracking: kernels.channel_moments(x, tracking),
    _channel_moments_formula,
    _pair_fake,
)
_define(
    "moments(Tensor sums, Tensor? elements, float n, TRACKING) -> Tensor",
    lambda sums, elements, n, *tracking: kernels.moments(sums, elements, n, tracking),
    _moments_formula,
    lambda sums, *_: doubles(sums, 3, sums.shape[1]),
)
_define(
    "fold(Tensor dx, Tensor x, Tensor dsums) -> Tensor",
    kernels.fold,
    lambda dx, x, dsums: nhwc(reference.fold(dx, x, dsums)),
    lambda dx, x, dsums: like(x, *x.shape),
)
_define(
    "batch_norm(Tensor x, BN, bool swish) -> Tensor",
    lambda x, *bn: kernels.bn_forward(x, bn[:3], bn[3]),
    lambda x, *bn: nhwc(reference.bn_forward(x, *bn[:3], swish=bn[3])),
    lambda x, *bn: like(x, *x.shape),
)


def _bn_backward_kernel(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *bn, swish, elements, n = args
    dx, params, through = kernels.bn_backward(dy, x, tuple(bn), swish, (elements, n))
    return dx, params.to(bn[0].dtype), through  # kernels return float32


def _bn_backward_formula(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *bn, swish, elements, n = args
    gamma, _, moments = bn
    dx, sums = reference.bn_backward(dy, x, *bn, swish=swish)
    return nhwc(dx), *reference.bn_gradients(sums, gamma, moments, elements, n)


def _bn_backward_fake(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    gamma, *_, elements, n = args
    c = x.shape[1]
    shape = (0,) if elements is None and not n else (2, c)
    return like(x, *x.shape), gamma.new_empty(2, c), doubles(x, *shape)


_define(
    "batch_norm_backward(Tensor dy, Tensor x, BN, bool swish, ELEMENTS) "
    "-> (Tensor, Tensor, Tensor)",
    _bn_backward_kernel,
    _bn_backward_formula,
    _bn_backward_fake,
)
_define(
    "depthwise(Tensor x, Tensor weight, int stride) -> Tensor",
    lambda x, weight, stride: kernels.depthwise_forward(x, weight, stride)[0],
    lambda x, weight, stride: nhwc(reference.depthwise(x, weight, stride)),
    lambda x, weight, stride: _out(x, stride),
)


def _depthwise_backward_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx, dw, *_ = kernels.depthwise_backward(dy, x, weight, stride, need_dx=need_dx, need_dw=need_dw)
    return dx, dw.to(weight.dtype)


def _depthwise_backward_formula(*args: Any) -> tuple[Tensor, Tensor]:
    dx, dw = reference.depthwise_backward(*args)
    return nhwc(dx), dw.contiguous()


def _depthwise_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = like(x, *x.shape) if need_dx else like(x, 0, 1, 1, 1)
    return dx, weight.new_empty(weight.shape if need_dw else 0)


_define(
    "depthwise_backward(Tensor dy, Tensor x, Tensor weight, int stride, bool need_dx, "
    "bool need_dw) -> (Tensor, Tensor)",
    _depthwise_backward_kernel,
    _depthwise_backward_formula,
    _depthwise_backward_fake,
)


def _fused_kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *bn, weight, stride, want_sums = args
    return kernels.depthwise_forward(x, weight, stride, tuple(bn), want_sums)[:2]


def _fused_formula(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *bn, weight, stride, want_sums = args
    y = reference.depthwise(reference.bn_forward(x, *bn, swish=True), weight, stride)
    return nhwc(y), reference.channel_sums(y) if want_sums else doubles(x, 0)


def _fused_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_, stride, want_sums = args
    return _out(x, stride), doubles(x, 2, x.shape[1]) if want_sums else doubles(x, 0)


_define(
    "bn_swish_depthwise(Tensor x, BN, Tensor weight, int stride, bool want_sums) "
    "-> (Tensor, Tensor)",
    _fused_kernel,
    _fused_formula,
    _fused_fake,
)


def _fused_moments_kernel(
    x: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, weight: Tensor, stride: int,
    *tracking: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    bn = (gamma, beta, moments)
    return kernels.depthwise_forward(x, weight, stride, bn, True, tracking)


def _fused_moments_formula(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, sums = _fused_formula(x, *args[:5], True)
    return y, sums, _moments_formula(sums, None, y.numel() / y.shape[1], *args[5:])


_define(
    "bn_swish_depthwise_moments(Tensor x, BN, Tensor weight, int stride, TRACKING) "
    "-> (Tensor, Tensor, Tensor)",
    _fused_moments_kernel,
    _fused_moments_formula,
    lambda x, *args: (_out(x, args[4]), *_pair_fake(x)),
)


def _fused_backward_kernel(
    dy: Tensor, y: Tensor, dsums: Tensor | None, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *bn, weight, stride, elements, n = args
    through_sums = None if dsums is None else (y, dsums)
    dx, dw, params, through = kernels.depthwise_backward(
        dy, x, weight, stride, tuple(bn), through_sums, elements=(elements, n)
    )
    return dx, params.to(bn[0].dtype), through, dw.to(weight.dtype)


def _fused_backward_formula(
    dy: Tensor, y: Tensor, dsums: Tensor | None, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *bn, weight, stride, elements, n = args
    dy = dy if dsums is None else reference.fold(dy, y, dsums)
    activation = reference.bn_forward(x, *bn, swish=True)
    da, dw = reference.depthwise_backward(dy, activation, weight, stride, True, True)
    return *_bn_backward_formula(da, x, *bn, True, elements, n), dw.contiguous()


def _fused_backward_fake(
    dy: Tensor, y: Tensor, dsums: Tensor | None, x: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    weight = args[3]
    return *_bn_backward_fake(dy, x, *args), weight.new_empty(weight.shape)


_define(
    "bn_swish_depthwise_backward(Tensor dy, Tensor y, Tensor? dsums, Tensor x, BN, "
    "Tensor weight, int stride, ELEMENTS) -> (Tensor, Tensor, Tensor, Tensor)",
    _fused_backward_kernel,
    _fused_backward_formula,
    _fused_backward_fake,
)
_define(
    "adamax_(Tensor(a!)[] weights, Tensor(b!)[] gradients, Tensor(c!)[] averages, "
    "Tensor(d!)[] norms, Tensor(e!) step, Tensor learning_rate, Tensor? switched_off, float beta1, "
    "float beta2, float eps, float weight_decay, Tensor(f!)[] moving, Tensor? share) -> ()",
    adamax_kernel,
    adamax_formula,
    lambda *_: None,
    adamax_cpu,
)
_define(
    "weight_norms(Tensor[] weights, Tensor[] gains, ScalarType dtype) "
    "-> (Tensor[], Tensor, Tensor)",
    weight_norm.weight_norms_kernel,
    weight_norm.weight_norms_formula,
    weight_norm.weight_norms_fake,
)
_define(
    "weight_norms_backward(Tensor[] gradients, Tensor[] weights, Tensor[] norms, Tensor[] scales) "
    "-> (Tensor[], Tensor[])",
    weight_norm.weight_norms_backward_kernel,
    weight_norm.weight_norms_backward_formula,
    weight_norm.weight_norms_backward_fake,
)
