"""Random numbers that are a pure function of (seed, epoch, stream, image index).

A counter-based generator has no state, so a picture's augmentation cannot depend on the batch it
came in, on the rank or on the number of workers, and a resumed run repeats it exactly. The mixing
function is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), on int64 tensors with wrap-around arithmetic: the same bits on CPU and CUDA.
"""

import torch
from torch import Tensor

UNIFORM_BITS = 24
"""Resolution of `uniform_bits`: every such integer is exact in float32."""


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit integer as the int64 that torch can hold."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_WORD = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SIGNED_GOLDEN, _SIGNED_MIX_1, _SIGNED_MIX_2 = map(_signed, (_GOLDEN, _MIX_1, _MIX_2))

# Streams: one purpose, one stream, so that no two draws ever share numbers.
STREAM_ORDER = 1
STREAM_FLIP = 2
STREAM_BINARIZE = 3
STREAM_CROP = 4
STREAM_SPLIT = 5
STREAM_CONTENT = 6


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not sign-extending) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Finaliser of splitmix64: a bijection of int64 whose output bits look independent."""
    x = (x ^ _shift_right(x, 30)) * _SIGNED_MIX_1
    x = (x ^ _shift_right(x, 27)) * _SIGNED_MIX_2
    return x ^ _shift_right(x, 31)


def _mix_integer(x: int) -> int:
    """The same of one Python integer, 0..2^64-1: a dozen tensor operations fewer a batch."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def image_keys(index: Tensor, *, seed: int, epoch: int, stream: int) -> Tensor:
    """One 64-bit key for every image.

    Args:
        index: (B,) int64, the image's index in its split.
        seed: any integer.
        epoch: non-negative; 0 where the draw is fixed once for all.
        stream: one of the `STREAM_*` constants.

    Returns:
        (B,) int64 on `index`'s device.
    """
    key = 0
    for word in (seed, epoch, stream):
        key = _mix_integer(((key ^ word) + _GOLDEN) & _WORD)
    return mix((index ^ _signed(key)) + _SIGNED_GOLDEN)


def uniform_bits(keys: Tensor, count: int) -> Tensor:
    """Uniform integers in [0, 2^24), `count` for every key: splitmix64 started at the key.

    Args:
        keys: (B,) int64 from `image_keys`.
        count: numbers for each image.

    Returns:
        (B, count) int64.
    """
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _SIGNED_GOLDEN
    return _shift_right(mix(keys[:, None] + counter), 64 - UNIFORM_BITS)


def permutation(n: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """A permutation of 0..n-1 that depends on nothing but its arguments, (n,) int64."""
    index = torch.arange(n, dtype=torch.int64)
    keys = image_keys(index, seed=seed, epoch=epoch, stream=stream)
    return torch.argsort(keys, stable=True)
