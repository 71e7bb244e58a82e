"""Batch-normalization statistics for sampling at a temperature (paper, section 4).

The running statistics were collected on posterior samples at temperature 1. Prior samples at a
lower temperature have other statistics; taking them anew sharpens the pictures. Passes over fresh
samples normalize by their own batch, and the batches' statistics are averaged with equal weights
in float32: no momentum, so no batch counts more than another. The network's own statistics come
back afterwards.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nvae.files import check_array, read_kept_arrays, write_arrays
from nvae.models import HierarchicalVAE
from nvae.models.layers import DataInitConv2d
from nvae.models.normalization import MOMENTUM, BatchNorm
from nvae.random import STREAM_RECALIBRATION, image_keys, latent_noise
from nvae.settings import check_fields

_LARGEST = 1 << 28
"""Bytes of a cache; the largest model in use has 8 MiB of statistics."""


class RecalibrationError(ValueError):
    """Statistics that are not finite, or a cache that cannot be read."""


@dataclass(frozen=True)
class RecalibrationSettings:
    """What recalibrated statistics depend on, besides the weights.

    Attributes:
        temperature: one a group, coarsest first.
        batches: passes that are averaged; the published system takes 500.
        batch_size: images in a pass. Every pass is normalized by its own batch, so this matters.
        seed: chooses the noise.
    """

    temperature: tuple[float, ...]
    batches: int = 500
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self, temperature=(None, 1000), batches=(None, 1_000_000), batch_size=(None, 65_536)
        )
        if not self.temperature:
            raise ValueError("temperature is empty; it takes one number a group")
        if min(self.temperature) < 0:
            raise ValueError(f"temperature is {min(self.temperature)}; it must be 0 or more")
        if self.batches < 1:
            raise ValueError(f"recalibrate_bn is {self.batches}; it must be at least 1")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size}; recalibration needs at least 2 images a batch"
            )


@dataclass(frozen=True)
class RecalibratedStatistics:
    """Means and unbiased variances of the norms that sampling runs through.

    Attributes:
        settings: how they were taken.
        fingerprint: of the weights they belong to (:func:`fingerprint`).
        mean: running mean ``(C,)`` of every norm, by module name, float32, CPU.
        variance: running variance ``(C,)``, likewise.
    """

    settings: RecalibrationSettings
    fingerprint: str
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]

    @contextmanager
    def applied(self, model: HierarchicalVAE) -> Iterator[None]:
        """These statistics inside the block, the network's own again afterwards."""
        norms = _norms(model)
        with _put_back([norms[name] for name in self.mean]):
            for name, mean in self.mean.items():
                norms[name].running_mean.copy_(mean)
                norms[name].running_var.copy_(self.variance[name])
            yield


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def recalibrate(
    model: HierarchicalVAE,
    settings: RecalibrationSettings,
    progress: Callable[[int], None] | None = None,
) -> RecalibratedStatistics:
    """Take statistics over ``settings.batches`` batches of prior samples.

    Args:
        model: any mode; mode and statistics are left as they were.
        settings: temperature, numbers, seed.
        progress: called with the number of passes just done.

    Raises:
        RecalibrationError: a statistic is not finite; the message names the norm.
        ValueError: not as many temperatures as groups, or a network without BN.
    """
    norms = _norms(model)
    if not norms:
        raise ValueError("recalibrate_bn: this model has no batch normalization")
    identity = fingerprint(model)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    with model.evaluating(), _put_back(norms.values()):
        for module in model.modules():
            # a cell in eval mode folds its norms away; data-dependent initialization must not
            # run on samples, nor dropout at all
            module.training = not isinstance(module, DataInitConv2d | _DropoutNd)
        for batch in range(settings.batches):
            _one_pass(model, norms, settings, batch, sums)
            if progress is not None:
                progress(1)
    return RecalibratedStatistics(
        settings,
        identity,
        {name: (mean / settings.batches).cpu() for name, (mean, _) in sums.items()},
        {name: (variance / settings.batches).cpu() for name, (_, variance) in sums.items()},
    )


def _one_pass(
    model: HierarchicalVAE,
    norms: dict[str, BatchNorm],
    settings: RecalibrationSettings,
    batch: int,
    sums: dict[str, tuple[Tensor, Tensor]],
) -> None:
    device = model.device
    for norm in norms.values():
        # from zero, one update leaves momentum * (the batch's statistic): it can be read off
        # whatever kernel computed it
        norm.running_mean.zero_()
        norm.running_var.zero_()
        norm.num_batches_tracked.zero_()
    start = batch * settings.batch_size
    index = torch.arange(start, start + settings.batch_size, device=device)
    keys = image_keys(index, seed=settings.seed, stream=STREAM_RECALIBRATION)
    noise = latent_noise(keys, model.latent_shapes, model.dtype)
    model.sample_logits(settings.batch_size, settings.temperature, noise)
    for name, norm in norms.items():
        if not norm.num_batches_tracked:  # the bottom-up network takes no part in sampling
            continue
        mean, variance = norm.running_mean.float(), norm.running_var.float()
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            raise RecalibrationError(
                f"recalibration at temperature {_brief(settings.temperature)} met numbers that "
                f"are not finite at {name}, pass {batch}; the network's statistics are unchanged"
            )
        total_mean, total_variance = sums.get(name, (0.0, 0.0))
        share = _momentum(norm)
        sums[name] = (total_mean + mean / share, total_variance + variance / share)


def _norms(model: HierarchicalVAE) -> dict[str, BatchNorm]:
    """Those with running statistics: ours, or torch's own in a model from elsewhere."""
    return {
        name: cast(BatchNorm, module)  # torch's have the same buffers
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm | TorchBatchNorm) and module.running_mean is not None
    }


def _momentum(norm: nn.Module) -> float:
    """Share of one batch in the running statistics, the first after they were set to zero."""
    momentum: float | None = getattr(norm, "momentum", MOMENTUM)
    return 1.0 if momentum is None else momentum  # None: the average of all batches


@contextmanager
def _put_back(norms: Iterable[BatchNorm]) -> Iterator[None]:
    """Whatever the block does to them, the norms have their own statistics again afterwards."""
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)


def _brief(temperature: tuple[float, ...]) -> str:
    values = sorted(set(temperature))
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def cache_path(checkpoint: Path, settings: RecalibrationSettings) -> Path:
    """Where statistics lie: beside the checkpoint, named by temperature and seed."""
    name = f"{checkpoint.stem}.bn-t{_brief(settings.temperature).replace(' ', '')}"
    if len(set(settings.temperature)) > 1:
        listed = ",".join(f"{t:g}" for t in settings.temperature)
        name += f"-{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
    name += f"-n{settings.batches}x{settings.batch_size}-seed{settings.seed}.npz"
    return checkpoint.with_name(name)


def save_statistics(statistics: RecalibratedStatistics, path: Path) -> None:
    """Write an npz file, atomically."""
    arrays = {
        **{f"mean/{name}": mean.numpy() for name, mean in statistics.mean.items()},
        **{f"variance/{name}": each.numpy() for name, each in statistics.variance.items()},
    }
    write_arrays(path, arrays, _protocol(statistics.settings, statistics.fingerprint))


def load_statistics(
    path: Path, settings: RecalibrationSettings, model: HierarchicalVAE
) -> RecalibratedStatistics | None:
    """Cached statistics if they are of this network and these settings, else None.

    Raises:
        RecalibrationError: there is a file, but it cannot be read, or its statistics are none that
            this network could have.
    """
    if not path.is_file():
        return None
    identity, norms = fingerprint(model), _norms(model)
    mean: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}
    try:
        found = read_kept_arrays(path, _protocol(settings, identity), _LARGEST)
        if found is None:
            return None
        for key, array in found.items():
            kind, _, name = key.partition("/")
            if name not in norms:
                raise ValueError(f"the model has no norm {name}")
            check_array(key, array, np.float32, tuple(norms[name].running_mean.shape))
            {"mean": mean, "variance": variance}[kind][name] = torch.from_numpy(array)
            if kind == "variance" and (array < 0).any():
                raise ValueError(f"{key} holds variances below 0")
        if not mean or mean.keys() != variance.keys():
            raise ValueError("means and variances are not of the same norms")
    except (OSError, KeyError, ValueError) as error:
        raise RecalibrationError(f"{path} cannot be read ({error}); delete it") from None
    return RecalibratedStatistics(settings, identity, mean, variance)


def _protocol(settings: RecalibrationSettings, fingerprint: str) -> str:
    return json.dumps({**asdict(settings), "fingerprint": fingerprint}, sort_keys=True)
