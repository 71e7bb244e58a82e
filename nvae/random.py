"""Random numbers that are a pure function of (seed, epoch, stream, image, draw).

A counter-based generator has no state. So an image's augmentation, its noise and its likelihood do
not depend on the batch it came in, nor on the number of workers or devices, and a resumed run
repeats them exactly. Every image has a 64-bit key, every draw and every latent group folds a word
into it, and elements are counters under the key. The mixing function is splitmix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), on int64 tensors with
wrap-around arithmetic: the same bits on the CPU and on CUDA.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# One purpose, one stream, so that no two draws ever share numbers. Those below 100 are the data's.
STREAM_ORDER = 1
STREAM_FLIP = 2
STREAM_BINARIZE = 3
STREAM_CROP = 4
STREAM_SPLIT = 5
STREAM_CONTENT = 6
STREAM_PRIOR = 101
STREAM_POSTERIOR = 102
STREAM_PIXELS = 103
STREAM_TRAVERSE = 104
STREAM_RECALIBRATION = 105
STREAM_RATIO = 106
STREAM_NOISE = 107

UNIFORM_BITS = 24
"""Resolution of :func:`uniform_bits`: every such integer is exact in float32."""

_WORD = (1 << 64) - 1
_LOW_HALF = (1 << 32) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit integer as the int64 that torch can hold."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


_SIGNED_GOLDEN, _SIGNED_MIX_1, _SIGNED_MIX_2 = map(_signed, (_GOLDEN, _MIX_1, _MIX_2))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not sign-extending) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finalizer of splitmix64: a bijection of int64 whose output bits look independent."""
    x = (x ^ _shift_right(x, 30)) * _SIGNED_MIX_1
    x = (x ^ _shift_right(x, 27)) * _SIGNED_MIX_2
    return x ^ _shift_right(x, 31)


def _mix_integer(x: int) -> int:
    """The same for one Python integer, 0..2^64-1; it saves a dozen tensor operations a batch."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def _words(keys: Tensor, count: int) -> Tensor:
    """``(B, count)`` 64-bit words: splitmix64 started at every key ``(B,)``."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _SIGNED_GOLDEN
    return _mix(keys[:, None] + counter)


def image_keys(index: Tensor, *, seed: int, stream: int, epoch: int = 0) -> Tensor:
    """One 64-bit key for every image.

    Args:
        index: ``(B,)`` int64, the image's index in its split, or its own seed.
        seed: any integer.
        stream: one of the ``STREAM_*`` constants.
        epoch: non-negative; 0 where the draw is fixed once for all.

    Returns:
        ``(B,)`` int64 on ``index``'s device.
    """
    key = 0
    for word in (seed, epoch, stream):
        key = _mix_integer(((key ^ word) + _GOLDEN) & _WORD)
    return _mix((index ^ _signed(key)) + _SIGNED_GOLDEN)


def fold_in(keys: Tensor, word: Tensor | int) -> Tensor:
    """New keys from ``keys`` and an integer ``word``; the two broadcast."""
    if isinstance(word, Tensor):
        word = word.to(keys.device)
    else:  # filled on the device: a copy from the host would make a GPU wait
        word = torch.full((), word, dtype=torch.int64, device=keys.device)
    return _mix((keys ^ _mix(word + _SIGNED_GOLDEN)) + _SIGNED_GOLDEN)


def permutation(n: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """A permutation of 0..n-1 that depends on nothing but its arguments, ``(n,)`` int64."""
    keys = image_keys(torch.arange(n), seed=seed, stream=stream, epoch=epoch)
    return torch.argsort(keys, stable=True)


def uniform_bits(keys: Tensor, count: int) -> Tensor:
    """Uniform integers in [0, 2^24), ``(B, count)`` int64, one row for every key ``(B,)``."""
    return _shift_right(_words(keys, count), 64 - UNIFORM_BITS)


def _halves(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers in (0, 1] for every 64-bit word: (k + 1/2) / 2^32, in float32 at least."""
    # 32-bit words overflow float16, and bfloat16 has 8 bits for them
    wide = torch.promote_types(dtype, torch.float32)
    high, low = (words >> 32) & _LOW_HALF, words & _LOW_HALF
    return (high.to(wide) + 0.5) * 2.0**-32, (low.to(wide) + 0.5) * 2.0**-32


def uniform(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1], ``(B, *shape)``, one row for every key ``(B,)``.

    Drawn in float32 at least; a half-precision ``dtype`` only rounds them.
    """
    count = math.prod(shape)
    pair = torch.cat(_halves(_words(keys, -(-count // 2)), dtype), dim=1)
    u = pair[:, :count].reshape(len(keys), *shape)
    if u.dtype == dtype:
        return u
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest number above 0
    return u.to(dtype).clamp(min=least)  # float16 would round the smallest to 0


def normal(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, ``(B, *shape)``, one row for every key ``(B,)``.

    Box and Muller (1958): sqrt(-2 log u) times cosine and sine of 2 pi v, in float32 at least; a
    half-precision ``dtype`` only rounds them.
    """
    count = math.prod(shape)
    u, v = _halves(_words(keys, -(-count // 2)), dtype)
    radius, angle = (-2 * u.log()).sqrt(), (2 * math.pi) * v
    pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pair[:, :count].reshape(len(keys), *shape).to(dtype)


def latent_noise(
    keys: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Standard normal noise of every latent group, one ``(B, L, h, w)`` a group.

    Args:
        keys: ``(B,)``, one for every row.
        shapes: ``(L, h, w)`` of every group, coarsest first.
        dtype: the model's.
    """
    return [normal(fold_in(keys, group), shape, dtype) for group, shape in enumerate(shapes)]


class PixelNoise:
    """Randomness of a likelihood's ``sample``, one stream an image.

    Every call takes the next part of the stream, so one object serves one ``sample``.

    Args:
        keys: ``(B,)``, one for every image.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._calls = 0

    def _next_keys(self) -> Tensor:
        self._calls += 1
        return fold_in(self._keys, self._calls)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in (0, 1], of ``like``'s shape and type."""
        return uniform(self._next_keys(), like.shape[1:], like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, of ``like``'s shape and type."""
        return normal(self._next_keys(), like.shape[1:], like.dtype)
