"""What a training pass derives from the weights alone, made for many layers by one operation.

A step of a deep model spends more time on starting thousands of small operations than on doing
them. Normalizing, masking and rounding the weights takes one for every convolution; so does adding
up the two gradients that a weight gets, from the data and from its regularizer. Here one serves
:data:`AT_ONCE` tensors. Not all: gradients made by one operation arrive together, and several
ranks exchange some while others are still being computed.

During the pass the layers find in the place of a parameter what was made of it. Where the kernels
do not run nothing is done, and every layer sees to its own.
"""

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nvae.models.layers import DataInitConv2d, PlainConv2d, WeightNormConv2d
from nvae.models.normalization import BatchNorm
from nvae.ops.library import has_kernels, to_autocast_dtype
from nvae.ops.multi_tensor import laid_out_like
from nvae.ops.weight_norm import weight_norms

AT_ONCE = 32
"""Convolutions whose weights are normalized by one launch."""
TENSORS_AT_ONCE = 64
"""Tensors of one launch of torch's multi-tensor operations on two lists."""
FIRST = 2**62
"""Above every number that autograd gives an operation itself: the highest runs first."""

T = TypeVar("T")
Place = tuple[MutableMapping[str, Any], str]
"""Where a layer looks a tensor up: a table of its attributes, and the name."""


@contextmanager
def _found(places: Sequence[Place], tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """Inside, every place holds its tensor; afterwards what it held before."""
    before = [table.get(name) for table, name in places]
    for (table, name), tensor in zip(places, tensors, strict=True):
        table[name] = tensor
    try:
        yield
    finally:
        for (table, name), tensor in zip(places, before, strict=True):
            table[name] = tensor


def found_again(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Inside, ``modules`` have what the training pass around this call has made of their weights.

    For computing a part of the pass a second time, in the backward pass.
    """
    return _found(*_made(modules))


def _made(modules: Iterable[nn.Module]) -> tuple[list[Place], list[Tensor]]:
    """What a training pass has put into ``modules``, and where."""
    places: list[Place] = []
    tensors: list[Tensor] = []
    for module in modules:
        for name, tensor in module._parameters.items():
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                places.append((module._parameters, name))
                tensors.append(tensor)
        if isinstance(module, WeightNormConv2d) and module.ready is not None:
            places.append((vars(module), "ready"))
            tensors.append(module.ready)
    return places, tensors


def handed_in(module: nn.Module) -> list[Tensor]:
    """Every tensor that a training pass has made of the weights inside ``module`` beforehand."""
    return _made(module.modules())[1]


@contextmanager
def weights_together(modules: Sequence[nn.Module]) -> Iterator[AbstractContextManager[None]]:
    """Inside, layers find their weights ready for a training pass.

    Yields:
        A context for the regularizers, to be entered at most once, inside or after this one: there
        the weights' gradients are added to the pass's own, many at once.
    """
    first = next((m for m in modules if isinstance(m, WeightNormConv2d | BatchNorm)), None)
    if not (
        first is not None
        and first.kernels != "reference"
        and first.weight.dtype == torch.float32
        and has_kernels(first.weight.device)
    ):
        yield nullcontext()
        return
    for_pass, for_regularizers = _Places(), _Places()
    low = to_autocast_dtype(first.weight[:0]).dtype
    _normalize(modules, low, for_pass, for_regularizers)
    _share_gammas(modules, for_pass, for_regularizers)
    if low != torch.float32:
        _round(modules, low, for_pass, for_regularizers)
    with for_pass.found():
        yield for_regularizers.found()


class _Places:
    """Tensors to be found, each in its place."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.tensors: list[Tensor | None] = []

    def put(self, places: Sequence[Place], tensors: Sequence[Tensor | None]) -> None:
        """Add some."""
        self.places += places
        self.tensors += tensors

    def found(self) -> AbstractContextManager[None]:
        """Inside, they are in their places."""
        return _found(self.places, self.tensors)


def _normalize(
    modules: Sequence[nn.Module], low: torch.dtype, for_pass: _Places, for_regularizers: _Places
) -> None:
    """All w_hat for the pass; masked weights and gains for the regularizers."""
    convs = [m for m in modules if isinstance(m, WeightNormConv2d) and not _starts(m)]
    full = torch.float32
    for dtype in dict.fromkeys((full, low)):
        of_type = [c for c in convs if (full if c.full_precision else low) == dtype]
        for some in _parts(of_type, AT_ONCE):
            first, second = _twice([*_masked(some), *(conv.log_gain for conv in some)])
            w_hats = weight_norms(first[: len(some)], first[len(some) :], dtype)
            _run_first(w_hats)
            for_pass.put([(vars(conv), "ready") for conv in some], w_hats)
            names = "weight", "log_gain"
            for_regularizers.put([(c._parameters, n) for n in names for c in some], second)
            masks = [(c._buffers, "mask") for c in some if c.mask is not None]
            for_regularizers.put(masks, [None] * len(masks))


def _starts(conv: WeightNormConv2d) -> bool:
    """Whether the batch at hand may set gain and bias: the layer writes to the parameters itself,
    and w_hat, in the backward pass too, is of what it has written."""
    return isinstance(conv, DataInitConv2d) and not conv.checked


def _masked(convs: Sequence[WeightNormConv2d]) -> list[Tensor]:
    """The weights, where there is a mask multiplied by it."""
    weights: list[Tensor] = [conv.weight for conv in convs]
    at = [index for index, conv in enumerate(convs) if conv.mask is not None]
    if at:
        products = _Products.apply(len(at), *(weights[i] for i in at), *(convs[i].mask for i in at))
        _run_first(products)
        for index, product in zip(at, products, strict=True):
            weights[index] = product
    return weights


def _share_gammas(
    modules: Sequence[nn.Module], for_pass: _Places, for_regularizers: _Places
) -> None:
    """Gammas of batch normalization for both."""
    places: list[Place] = [(m._parameters, "weight") for m in modules if isinstance(m, BatchNorm)]
    for some in _parts(places, TENSORS_AT_ONCE):
        first, second = _twice([table[name] for table, name in some])
        for_pass.put(some, first)
        for_regularizers.put(some, second)


def _round(
    modules: Sequence[nn.Module], low: torch.dtype, for_pass: _Places, for_regularizers: _Places
) -> None:
    """The weights and biases that autocast would round one by one."""
    places: list[Place] = []
    plain: list[Place] = []
    for module in modules:
        if isinstance(module, WeightNormConv2d):
            if module.bias is not None and not (module.full_precision or _starts(module)):
                places.append((module._parameters, "bias"))
        elif isinstance(module, PlainConv2d):
            plain.append((module._parameters, "weight"))
        elif isinstance(module, nn.Linear):
            places += [(module._parameters, name) for name in ("weight", "bias")]
    for some in _parts(plain, TENSORS_AT_ONCE):
        first, second = _twice([table[name] for table, name in some])
        for_pass.put(some, _rounded(first, low))
        for_regularizers.put(some, second)
    for some in _parts(places, TENSORS_AT_ONCE):
        for_pass.put(some, _rounded([table[name] for table, name in some], low))


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _run_first(tensors: Sequence[Tensor]) -> None:
    """In the backward pass, as soon as the gradients are there.

    Autograd runs what was made last first: this would wait until all of the model has been through.
    """
    node = tensors[0].grad_fn
    if node is not None:
        node._set_sequence_nr(FIRST)  # type: ignore[attr-defined]


def _twice(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same tensors for two uses, whose gradients are added together."""
    both = _Twice.apply(*tensors)
    _run_first(both)
    return list(both[: len(tensors)]), list(both[len(tensors) :])


def _rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another type."""
    rounded = _Rounded.apply(dtype, *tensors)
    _run_first(rounded)
    return list(rounded)


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in (*tensors, *tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        half = len(gradients) // 2
        first, second = gradients[:half], gradients[half:]
        both = [
            (a, laid_out_like(a, b))
            for a, b in zip(first, second, strict=True)
            if a is not None and b is not None
        ]
        sums = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both else ())
        return tuple(
            (b if a is None else a) if a is None or b is None else next(sums)
            for a, b in zip(first, second, strict=True)
        )


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(_in_type(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_in_type([g for g in gradients if g is not None], ctx.dtype))
        return None, *(None if gradient is None else next(wide) for gradient in gradients)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.factors = tensors[count:]
        return tuple(_products(tensors[:count], ctx.factors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(g, f) for g, f in zip(gradients, ctx.factors, strict=True) if g is not None]
        products = iter(_products([g for g, _ in pairs], [f for _, f in pairs]))
        of_tensors = (None if gradient is None else next(products) for gradient in gradients)
        return None, *of_tensors, *(None for _ in ctx.factors)


def _products(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> Sequence[Tensor]:
    alike = [laid_out_like(t, f) for t, f in zip(tensors, factors, strict=True)]
    return torch._foreach_mul(list(tensors), alike) if alike else ()


def _in_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
