"""Negative ELBO and importance-weighted log-likelihood of the images of a split.

log p(x) >= E log (1/K) sum_k p(x | z_k) p(z_k) / q(z_k | x)  (Burda et al. 2016, equation 8),
with K = 1 the ELBO. The bottom-up pass does not depend on the draw and is done once an image;
draws go through the top-down pass in chunks, so memory does not grow with K.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nvae.evaluation.result import (
    EvaluationResult,
    ImageRecords,
    RecordStore,
    concatenate,
    pool_ranks,
    summarize,
)
from nvae.models import HierarchicalVAE, Output
from nvae.random import STREAM_POSTERIOR, fold_in, image_keys, latent_noise
from nvae.sampling.grids import IndexedImages
from nvae.settings import check_fields

MOST_DRAWS = 10_000_000
"""Draws of one image; more would take years."""

_MOST_BOUNDS = 1000

Progress = Callable[[int], None]
"""Called with the number of rows just done; a row is one draw of one image."""

Compute = Callable[[Tensor, Tensor, Tensor | None], ImageRecords]
"""Records of images ``(B, C, H, W)`` in [0, 1] from their indices ``(B,)`` and labels, if any."""


@dataclass(frozen=True)
class BoundSettings:
    """How many draws, and from which seed.

    Attributes:
        importance_samples: values of K, each at least 1; they share their draws, the first K of
            them. Empty for the ELBO alone.
        elbo_samples: draws that ELBO, KL and reconstruction are averaged over.
        seed: chooses the posterior's noise.
        chunk: rows (images times draws) in one top-down pass; bounds the memory.

    Raises:
        ValueError: a number is below 1, beyond reason, or none.
    """

    importance_samples: tuple[int, ...] = ()
    elbo_samples: int = 1
    seed: int = 0
    chunk: int = 256

    def __post_init__(self) -> None:
        check_fields(
            self, importance_samples=(None, MOST_DRAWS), elbo_samples=(1, MOST_DRAWS),
            chunk=(1, MOST_DRAWS),
        )  # fmt: skip
        if len(self.importance_samples) > _MOST_BOUNDS:
            raise ValueError(f"importance_samples holds more than {_MOST_BOUNDS} values of K")
        if any(k < 1 for k in self.importance_samples):
            raise ValueError(
                f"importance_samples holds {min(self.importance_samples)}; every K must be "
                "at least 1"
            )
        object.__setattr__(self, "importance_samples", tuple(sorted(set(self.importance_samples))))

    @property
    def draws(self) -> int:
        """Draws of every image."""
        return max((self.elbo_samples, *self.importance_samples))

    @property
    def images_per_pass(self) -> int:
        """Images worked on together: few where there are many draws, so that little is lost."""
        return max(1, self.chunk // self.draws)

    def draw_ranges(self, images: int) -> Iterator[range]:
        """Draws in chunks that end wherever a bound is read off."""
        stops = {self.elbo_samples, *self.importance_samples}
        start = 0
        while start < self.draws:
            stop = min(start + max(1, self.chunk // images), *(s for s in stops if s > start))
            yield range(start, stop)
            start = stop


def evaluate(
    model: HierarchicalVAE,
    batches: Iterable[IndexedImages],
    *,
    importance_samples: Sequence[int] = (),
    elbo_samples: int = 1,
    seed: int = 0,
    chunk: int = 256,
    progress: Progress | None = None,
    store: RecordStore | None = None,
    labels: bool = True,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> EvaluationResult:
    """Negative ELBO with its parts and importance-weighted NLL.

    An image's noise depends on ``seed``, its index and the draw only, and sums are in float64 in
    the order of the index. So batch size, workers and devices do not change the result beyond
    what the device's own arithmetic does (about 1e-6 relative in float32).

    Args:
        model: any mode; evaluated in eval mode and left as it was.
        batches: of one split, bits and binarization already applied; moved to the model's device.
        importance_samples: values of K; see :class:`BoundSettings` for this and the next three.
        elbo_samples: draws of the ELBO.
        seed: chooses the posterior's noise.
        chunk: rows in one pass.
        progress: called with the rows just done, also for those that ``store`` had already.
        store: finished images; those in it are not computed again.
        labels: a model with classes is told those of the batches that have ``labels``; False: none.
        distributed: every rank of the process group calls this with its share of the images, and
            every rank gets the result of all, or an error where one rank meets one.
        group: of the ranks; None: the default one.

    Raises:
        ValueError: no images, wrong sizes, impossible settings or a model in half precision.
        FloatingPointError: a likelihood is not finite.
    """
    settings = BoundSettings(tuple(importance_samples), elbo_samples, seed, chunk)
    if store is not None:
        groups, channels = model.num_groups, model.latent_channels
        store.check_shapes(groups, channels, len(settings.importance_samples))

    def compute(x: Tensor, index: Tensor, labels: Tensor | None) -> ImageRecords:
        return bound_images(model, x, index, settings, progress, labels)

    records = image_records(
        model, batches, compute, images_per_pass=settings.images_per_pass,
        rows_per_image=settings.draws, progress=progress, store=store, labels=labels,
        distributed=distributed, group=group,
    )  # fmt: skip
    return summarize(records, model, settings.importance_samples)


def image_records(
    model: HierarchicalVAE,
    batches: Iterable[IndexedImages],
    compute: Compute,
    *,
    images_per_pass: int,
    rows_per_image: int,
    progress: Progress | None = None,
    store: RecordStore | None = None,
    labels: bool = True,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> ImageRecords:
    """What ``compute`` finds of every image, sorted by index; images in ``store`` are done already.

    Args:
        model: any mode; ``compute`` is called in eval mode, and the model is left as it was.
        batches: objects with images ``x`` ``(B, C, H, W)`` in [0, 1] and ``index`` ``(B,)`` int64.
        compute: gives the records of some images; it reports their progress itself.
        images_per_pass: the most images that ``compute`` is given at once.
        rows_per_image: progress to report for an image that ``store`` has already.
        progress: called with the rows of images that ``store`` has already.
        store: finished images; those in it are not computed again, and new ones are added.
        labels: give ``compute`` the ``labels`` ``(B,)`` of batches that have them, where the model
            has classes; False: none.
        distributed: every rank of the process group calls this with its share of the images, and
            every rank gets the records of all, or an error where one rank meets one.
        group: process group of the ranks; None: the default one.

    Raises:
        ValueError: no images, wrong sizes or a model in half precision.
        Exception: what ``compute`` raises.
    """
    _check_precision(model)
    records, error = None, None
    try:
        with model.evaluating():
            records = _all_records(
                model, batches, compute, images_per_pass, rows_per_image, progress, store, labels
            )
    except Exception as failure:  # the other ranks must hear of it
        if not distributed:
            raise
        error = failure
    finally:
        if store is not None:
            store.save()
    if distributed:
        records = pool_ranks(records, error, group)
    if records is None:
        raise ValueError("no images to evaluate: the data gave no batch")
    return records


def _check_precision(model: HierarchicalVAE) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the model's {name} is {parameter.dtype}: the pixels would be rounded with it, "
                "and the likelihood be that of other images; evaluate model.float()"
            )


def _all_records(
    model: HierarchicalVAE,
    batches: Iterable[IndexedImages],
    compute: Compute,
    images_per_pass: int,
    rows_per_image: int,
    progress: Progress | None,
    store: RecordStore | None,
    told: bool,
) -> ImageRecords | None:
    done = frozenset() if store is None else store.done
    parts = [] if store is None or store.records is None else [store.records]
    for batch in batches:
        todo = torch.tensor([int(i) not in done for i in batch.index.tolist()])
        x, index = batch.x.to(model.device, model.dtype), batch.index
        labels = model.labels_of(batch) if told else None
        model.check_images(x)
        if not todo.all():
            if progress is not None:
                progress(int((~todo).sum()) * rows_per_image)
            x, index = x[todo.to(x.device)], index[todo.to(index.device)]
            labels = None if labels is None else labels[todo.to(labels.device)]
        for start in range(0, len(x), images_per_pass):
            rows = slice(start, start + images_per_pass)
            own = None if labels is None else labels[rows]
            records = compute(x[rows], index[rows], own)
            parts.append(records)
            if store is not None:
                store.add(records)
    return concatenate(parts) if parts else None


class LogWeights:
    """Running log of the sums of w and w^2 over draws, for every image, in float64."""

    def __init__(self, images: int) -> None:
        self._log_sum = torch.full((images,), -torch.inf, dtype=torch.float64)
        self._log_sum_squares = self._log_sum.clone()
        self._draws = 0

    def add(self, log_weight: Tensor) -> None:
        """Take ``(B, k)`` log weights in."""
        log_weight = log_weight.to("cpu", torch.float64)
        self._log_sum = torch.logaddexp(self._log_sum, log_weight.logsumexp(1))
        self._log_sum_squares = torch.logaddexp(
            self._log_sum_squares, (2 * log_weight).logsumexp(1)
        )
        self._draws += log_weight.shape[1]

    @property
    def log_mean(self) -> Tensor:
        """log (1/K) sum w, ``(B,)``."""
        return self._log_sum - torch.tensor(float(self._draws), dtype=torch.float64).log()

    @property
    def effective_samples(self) -> Tensor:
        """(sum w)^2 / sum w^2, ``(B,)``, between 1 and K."""
        return (2 * self._log_sum - self._log_sum_squares).exp()


@torch.inference_mode()
def bound_images(
    model: HierarchicalVAE,
    x: Tensor,
    index: Tensor,
    settings: BoundSettings,
    progress: Progress | None = None,
    labels: Tensor | None = None,
) -> ImageRecords:
    """Bounds of images ``(B, C, H, W)``, best :attr:`BoundSettings.images_per_pass` at a time.

    The model is in eval mode and the images are on its device; their noise depends on ``index``,
    ``(B,)`` int64. ``labels``, likewise, are classes that the model is told.

    Raises:
        FloatingPointError: a number is not finite; the message names the image.
    """
    images = len(x)
    encoder_maps = model.encode(x)
    keys = image_keys(index.to(x.device), seed=settings.seed, stream=STREAM_POSTERIOR)
    weights = LogWeights(images)
    reconstruction = torch.zeros(images, dtype=torch.float64)
    kl = torch.zeros(images, model.num_groups, model.latent_channels, dtype=torch.float64)
    evidence, effective = [], []
    for draws in settings.draw_ranges(images):
        output, log_likelihood = decode_draws(model, x, encoder_maps, keys, draws, labels)
        rows = (images, len(draws))
        if draws.start < settings.elbo_samples:
            reconstruction -= log_likelihood.view(rows).double().sum(1).cpu()
            kl += output.kl_by_channel.double().unflatten(0, rows).sum(1).cpu()
        if draws.start < max(settings.importance_samples, default=0):
            log_weight = log_likelihood.double() + output.log_p.double() - output.log_q.double()
            weights.add(log_weight.view(rows))
        if draws.stop in settings.importance_samples:
            evidence.append(weights.log_mean)
            effective.append(weights.effective_samples)
        if progress is not None:
            progress(images * len(draws))
    records = ImageRecords(
        index=index.cpu().numpy().astype(np.int64),
        reconstruction=(reconstruction / settings.elbo_samples).numpy(),
        kl_per_channel=(kl / settings.elbo_samples).numpy(),
        log_evidence=_columns(evidence, images),
        effective_samples=_columns(effective, images),
    )
    _check_finite(records)
    return records


def decode_draws(
    model: HierarchicalVAE,
    x: Tensor,
    encoder_maps: Sequence[Tensor],
    keys: Tensor,
    draws: range,
    labels: Tensor | None,
) -> tuple[Output, Tensor]:
    """Top-down pass of some draws from the posteriors.

    Args:
        model: in eval mode.
        x: images ``(B, C, H, W)``.
        encoder_maps: of ``model.encode(x)``.
        keys: ``(B,)``, of the images' noise.
        draws: k numbers.
        labels: classes ``(B,)`` or None.

    Returns:
        The pass, its rows image-major, ``(B * k, ...)``, and log p(x | z), ``(B * k,)``.
    """
    k = len(draws)
    noise = noise_of_draws(model, keys, draws, x.dtype)
    # once where groups share a map: the layers of a deep model read a few maps between them
    distinct = {id(feature): feature for feature in encoder_maps}
    repeated = {key: feature.repeat_interleave(k, dim=0) for key, feature in distinct.items()}
    maps = [repeated[id(feature)] for feature in encoder_maps]
    own = None if labels is None else labels.repeat_interleave(k)
    given = model.conditioned_by(own, len(x) * k)
    state, groups = model.top_down(noise, encoder_maps=maps, **given)
    output = Output(model.decode_state(state), groups)
    log_likelihood = model.likelihood(output.logits).log_prob(x.repeat_interleave(k, dim=0))
    return output, log_likelihood


def noise_of_draws(
    model: HierarchicalVAE, keys: Tensor, draws: range, dtype: torch.dtype
) -> list[Tensor]:
    """Standard normal noise of every group for k draws of images with ``keys`` ``(B,)``: one
    ``(B * k, L, h, w)`` a group, image-major."""
    words = torch.arange(draws.start, draws.stop, device=keys.device)
    return latent_noise(fold_in(keys[:, None], words).flatten(), model.latent_shapes, dtype)


def _columns(values: list[Tensor], images: int) -> NDArray[np.float64]:
    return np.stack([v.numpy() for v in values], axis=1) if values else np.zeros((images, 0))


def _check_finite(records: ImageRecords) -> None:
    per_image = (
        np.isfinite(records.reconstruction)
        & np.isfinite(records.kl_per_channel).all((1, 2))
        & np.isfinite(records.log_evidence).all(1)
    )
    if not per_image.all():
        bad = records.index[~per_image][0]
        raise FloatingPointError(f"the likelihood of image {bad} is not a finite number")
