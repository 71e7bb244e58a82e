"""How fast a run trains: images, time without data, memory, and arithmetic against the peak."""

import logging
import resource
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nvae.models import HierarchicalVAE
from nvae.regularizers import batchnorms

_LOG = logging.getLogger(__name__)
GIB = 2**30
PASSES = 3
"""Forward, and twice as much backward: gradients of inputs and of weights."""

PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250, 1125, 75),
    ("H200", 989, 495, 67),
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989, 495, 67),
    ("A100", 312, 156, 19.5),
    ("L40S", 362, 183, 91.6),
    ("L4", 121, 60, 30.3),
    ("A10", 125, 62.5, 31.2),
)
"""Part of a GPU's name; dense peak in TFLOP/s in 16 bits, TF32 and float32, by its maker."""


class Throughput:
    """Speed between two readings, by the host's clock; no method waits for the device.

    Attributes:
        images: trained since the last reading, on all ranks; the caller counts them.
    """

    def __init__(self) -> None:
        self._flops: float | None = None
        self.start()

    def start(self) -> None:
        """Forget what was before."""
        self.images = 0
        self._waited = 0.0
        self._idle_since: float | None = None
        self._since = self._paused = time.perf_counter()

    def pause(self) -> None:
        """What comes is no training."""
        self.resume()
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Training again, as from :meth:`pause`, with the loader's turn."""
        self.wait()
        self._since += time.perf_counter() - self._paused

    def wait(self) -> None:
        """From now on the host waits for data."""
        self._idle_since = time.perf_counter()

    def resume(self) -> None:
        """A batch is there."""
        if self._idle_since is not None:
            self._waited += time.perf_counter() - self._idle_since
        self._idle_since = None

    def read(self, model: HierarchicalVAE, precision: str, world_size: int) -> dict[str, float]:
        """Metrics since the last reading, and the next one's start.

        Args:
            model: in training; its arithmetic is counted once.
            precision: the trainer's, such as ``bf16-mixed``.
            world_size: processes that share the work.

        Returns:
            ``train/images_per_second``, on all ranks; ``train/data_wait``, the share of the time in
            which this process waited for its loader; ``train/peak_memory_gib``, of this process
            since it started: allocated on its GPU, on the CPU resident in memory;
            ``train/tflops``, 10^12 operations a second of one device; and where its peak is known
            ``train/mfu``, that as a share of the peak.
        """
        elapsed = time.perf_counter() - self._since
        speed = self.images / elapsed
        metrics = {
            "train/images_per_second": speed,
            "train/data_wait": self._waited / elapsed,
            "train/peak_memory_gib": peak_memory(model.device),
        }
        if self._flops is None:
            self._flops = flops_per_image(model)
        if self._flops:
            metrics["train/tflops"] = speed * self._flops / world_size / 1e12
            peak = peak_tflops(model.device, precision)
            if peak is not None:
                metrics["train/mfu"] = metrics["train/tflops"] / peak
        self.start()
        return metrics


def flops_per_image(model: HierarchicalVAE) -> float:
    """Floating-point operations of a training step for an image: convolutions and products.

    A multiplication and an addition are two. Counted in a forward pass of tensors without storage;
    recomputed activations and regularizers are not among a model's operations. 0 where the model
    cannot be traced so.
    """
    meta = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    x = torch.zeros(1, *model.config.image_shape, dtype=model.dtype, device="meta")
    norms = batchnorms(model)
    groups = [norm.group for norm in norms]
    counter = FlopCounterMode(display=False)
    # importing the compiler takes seconds: only where it is in use
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    try:
        for norm in norms:
            norm.group = None
        with torch.no_grad(), eager, counter:
            functional_call(model, meta, (x.to(memory_format=torch.channels_last),))
    except Exception as error:  # a model from elsewhere may look at values, which are not there
        _LOG.warning("train/tflops is left out: %s", str(error).splitlines()[0])
        return 0.0
    finally:
        for norm, group in zip(norms, groups, strict=True):
            norm.group = group
    return float(PASSES * counter.get_total_flops())


def peak_memory(device: torch.device) -> float:
    """GiB; see :meth:`Throughput.read`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Of a GPU in the table, in the type that convolutions run in; None elsewhere."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, half, tf32, single in PEAKS:
        if known in name:
            if "16" in precision:
                return half
            cudnn: Any = torch.backends.cudnn
            return tf32 if cudnn.conv.fp32_precision == "tf32" else single
    return None
