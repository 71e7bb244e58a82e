"""Standard normal noise that is a pure function of (seed, image, draw).

A picture must not change with the batch it is drawn in, nor a likelihood with the number of
workers or devices. So noise has no state: every image has a 64-bit key, every draw and every
group folds a word into it, and elements are counters under the key. It is made where it is used,
on CPU or GPU, from the same integers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nvae.counter_rng import image_keys, mix

# Streams: one purpose, one stream. Those below 100 belong to the data pipeline.
STREAM_PRIOR = 101
STREAM_POSTERIOR = 102
STREAM_PIXELS = 103
STREAM_TRAVERSE = 104

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of splitmix64
_HALF_WORD = 32
_LOW_MASK = (1 << _HALF_WORD) - 1


def keys_of(index: Tensor, *, seed: int, stream: int) -> Tensor:
    """One key for every image.

    Args:
        index: ``(B,)`` int64, index in the split or the image's own seed.
        seed: of the whole evaluation.
        stream: one of the ``STREAM_*`` constants.

    Returns:
        ``(B,)`` int64.
    """
    return image_keys(index, seed=seed, epoch=0, stream=stream)


def fold_in(keys: Tensor, word: Tensor | int) -> Tensor:
    """New keys from ``keys`` and an integer ``word``; the two broadcast."""
    return mix((keys ^ (mix(_as_tensor(word, keys) + _GOLDEN))) + _GOLDEN)


def _as_tensor(word: Tensor | int, like: Tensor) -> Tensor:
    if isinstance(word, Tensor):
        return word.to(like.device)
    # filled on the device: a copy from the host would make a GPU wait
    return torch.full((), word, dtype=torch.int64, device=like.device)


def _words(keys: Tensor, count: int) -> Tensor:
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
    return mix(keys[:, None] + counter)


def _halves(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers in (0, 1] for every 64-bit word: (k + 1/2) / 2^32, in float32 at least."""
    # 32-bit words overflow float16, and bfloat16 has 8 bits for them
    wide = torch.promote_types(dtype, torch.float32)
    scale = 2.0**-_HALF_WORD
    high = (words >> _HALF_WORD) & _LOW_MASK
    low = words & _LOW_MASK
    return (high.to(wide) + 0.5) * scale, (low.to(wide) + 0.5) * scale


def uniform(keys: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1], ``(B, *shape)``, one row for every key ``(B,)``.

    Drawn in float32 at least; a half-precision ``dtype`` only rounds them.
    """
    count = math.prod(shape)
    first, second = _halves(_words(keys, -(-count // 2)), dtype)
    u = torch.cat([first, second], dim=1)[:, :count].reshape(len(keys), *shape)
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
    """Noise for every latent group, one ``(B, L, h, w)`` a group.

    Args:
        keys: ``(B,)``, one for every row.
        shapes: ``(L, h, w)`` of every group, coarsest first.
        dtype: of the model.
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
        """In (0, 1], of ``like``'s shape and type."""
        return uniform(self._next_keys(), like.shape[1:], like.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, of ``like``'s shape and type."""
        return normal(self._next_keys(), like.shape[1:], like.dtype)
