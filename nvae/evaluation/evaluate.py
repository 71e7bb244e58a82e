"""Evaluate a model on the images of a split."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nvae.evaluation.bound import BoundSettings, Progress, bound_images
from nvae.evaluation.records import ImageRecords, RecordStore, concatenate, pool_ranks
from nvae.evaluation.result import EvaluationResult, summarize
from nvae.models import HierarchicalVAE


class EvalBatch(Protocol):
    """Images and their places in the split."""

    @property
    def x(self) -> Tensor:
        """``(B, C, H, W)`` in [0, 1]; bits and binarisation already applied."""
        ...

    @property
    def index(self) -> Tensor:
        """``(B,)`` int64."""
        ...


def evaluate(
    model: HierarchicalVAE,
    batches: Iterable[EvalBatch],
    *,
    importance_samples: Sequence[int] = (),
    elbo_samples: int = 1,
    seed: int = 0,
    chunk: int = 256,
    progress: Progress | None = None,
    store: RecordStore | None = None,
    distributed: bool = False,
) -> EvaluationResult:
    """Negative ELBO with its parts and importance-weighted NLL.

    An image's noise depends on ``seed``, its index and the draw only, and sums are in float64 in
    the order of the index. So batch size, workers and devices do not change the result beyond
    what the device's own arithmetic does (about 1e-6 relative in float32).

    Args:
        model: any mode; evaluated in eval mode and left as it was.
        batches: of one split; moved to the model's device.
        importance_samples: values of K, each at least 1; empty for the ELBO alone.
        elbo_samples: draws that ELBO, KL and reconstruction are averaged over.
        seed: of the posterior's noise.
        chunk: rows (images times draws) in one pass; bounds the memory whatever K.
        progress: called with the rows just done, also for those that ``store`` had already.
        store: finished images; those in it are not computed again.
        distributed: every rank of the process group calls this with its share of the images, and
            every rank gets the result of all.

    Raises:
        ValueError: no images, wrong sizes, impossible settings or a model in half precision.
        FloatingPointError: a likelihood is not finite.
    """
    settings = BoundSettings(tuple(importance_samples), elbo_samples, seed, chunk)
    _check_precision(model)
    if store is not None:
        groups, channels = model.num_groups, model.latent_channels
        store.check_shapes(groups, channels, len(settings.importance_samples))
    try:
        with model.evaluating():
            records = _all_records(model, batches, settings, progress, store)
    finally:
        if store is not None:
            store.save()
    if distributed:
        records = pool_ranks(records)
    if records is None:
        raise ValueError("no images to evaluate: the data gave no batch")
    return summarize(records, model, settings)


def _check_precision(model: HierarchicalVAE) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the model's {name} is {parameter.dtype}: the pixels would be rounded with it, "
                "and the likelihood be that of other images; evaluate model.float()"
            )


def _all_records(
    model: HierarchicalVAE,
    batches: Iterable[EvalBatch],
    settings: BoundSettings,
    progress: Progress | None,
    store: RecordStore | None,
) -> ImageRecords | None:
    like = next(model.parameters())
    done = frozenset() if store is None else store.done
    parts = [] if store is None or store.records is None else [store.records]
    for batch in batches:
        todo = torch.tensor([int(i) not in done for i in batch.index.tolist()])
        x, index = batch.x.to(like), batch.index
        model.check_images(x)
        if not todo.all():
            if progress is not None:
                progress(int((~todo).sum()) * settings.draws)
            x, index = x[todo.to(x.device)], index[todo.to(index.device)]
        size = settings.images_per_pass
        for images, indices in zip(x.split(size), index.split(size), strict=True):
            if not len(images):  # split gives one empty piece for an empty batch
                continue
            records = bound_images(model, images, indices, settings, progress)
            parts.append(records)
            if store is not None:
                store.add(records)
    return concatenate(parts) if parts else None
