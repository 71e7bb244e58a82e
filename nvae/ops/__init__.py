"""Fused operations of the decoder's cells: depthwise convolution, batch normalization, Swish.

Three functions, each with a reference implementation in plain PyTorch and CUDA kernels that are
compiled at first use. ``impl`` chooses: ``"auto"`` takes a kernel where one applies, ``"cuda"``
insists on it, ``"reference"`` never compiles one.
"""

from nvae.ops.batchnorm import (
    BatchMoments,
    Statistics,
    Tracked,
    batch_norm,
    bn_swish,
    fixed_moments,
)
from nvae.ops.depthwise import BnSwishDepthwise, bn_swish_depthwise, depthwise_conv2d
from nvae.ops.library import Impl

__all__ = [
    "BatchMoments",
    "BnSwishDepthwise",
    "Impl",
    "Statistics",
    "Tracked",
    "batch_norm",
    "bn_swish",
    "bn_swish_depthwise",
    "depthwise_conv2d",
    "fixed_moments",
]
