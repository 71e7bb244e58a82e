"""Fused operations of the decoder's cells: depthwise convolution, batch normalisation, Swish.

Three functions, each with a reference implementation in plain PyTorch and CUDA kernels that are
compiled at first use. ``impl`` chooses: ``"auto"`` takes a kernel where one applies, ``"cuda"``
insists on it, ``"reference"`` never does.
"""

from nvae.ops.batch_norm import Normalised, batch_norm
from nvae.ops.bn_swish import bn_swish
from nvae.ops.bn_swish_depthwise import BnSwishDepthwise, bn_swish_depthwise
from nvae.ops.depthwise import depthwise_conv2d
from nvae.ops.dispatch import Impl
from nvae.ops.statistics import Statistics

__all__ = [
    "BnSwishDepthwise",
    "Impl",
    "Normalised",
    "Statistics",
    "batch_norm",
    "bn_swish",
    "bn_swish_depthwise",
    "depthwise_conv2d",
]
