"""What a model says of single images: how well it explains them, and which part of it does.

Likelihood alone misleads: complex models find simple images *more* likely than those that they were
trained on, for simple images cost little at the fine groups, whatever they show (Nalisnick et al.
2019, "Do deep generative models know what they don't know?"). Likelihood ratios ask the coarse
groups instead (Havtorn et al. 2021, "Hierarchical VAEs know what they don't know").
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nvae.evaluation import BoundSettings, Progress, RecordStore
from nvae.evaluation.likelihood import (
    MOST_DRAWS,
    bound_images,
    decode_draws,
    image_records,
    noise_of_draws,
)
from nvae.evaluation.result import ImageRecords
from nvae.files import check_array
from nvae.models import HierarchicalVAE
from nvae.random import STREAM_POSTERIOR, STREAM_RATIO, image_keys
from nvae.sampling.grids import IndexedImages
from nvae.settings import check_fields


@dataclass(frozen=True)
class ScoreSettings(BoundSettings):
    """How many draws, and from which seed.

    Attributes:
        ratio_samples: draws that the bounds of the likelihood ratios are averaged over.

    Raises:
        ValueError: a number is below 1, beyond reason, or none.
    """

    ratio_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ratio_samples=(1, MOST_DRAWS))

    @property
    def images_per_pass(self) -> int:
        """Images worked on together."""
        return max(1, self.chunk // max(self.draws, self.ratio_samples))


@dataclass(frozen=True)
class ScoreRecords(ImageRecords):
    """Results of N images, of which :class:`ImageRecords` has all but this.

    Attributes:
        partial_bounds: L^{>k} for k = 0 .. G, ``(N, G + 1)``, nats: the k finest groups are drawn
            from the prior, the others from the posterior. k = 0 is the ELBO.
    """

    partial_bounds: NDArray[np.float64]

    def check(self) -> None:
        """See :class:`ImageRecords`."""
        super().check()
        shape = len(self), self.kl_per_channel.shape[1] + 1
        check_array("partial_bounds", self.partial_bounds, np.float64, shape)

    @property
    def kl_per_group(self) -> NDArray[np.float64]:
        """KL(q || p) of every group, coarsest first, ``(N, G)``, nats."""
        return self.kl_per_channel.sum(2)

    @property
    def negative_elbo(self) -> NDArray[np.float64]:
        """-ELBO, ``(N,)``, nats."""
        return self.reconstruction + self.kl_per_channel.sum((1, 2))

    @property
    def ratios(self) -> NDArray[np.float64]:
        """LLR^{>k} = L - L^{>k} for k = 1 .. G, ``(N, G)``, nats (Havtorn et al. 2021).

        How much worse the image gets when its k finest groups are the prior's choice. Large for an
        image whose coarse latents do not say what it is. Both bounds share their posterior draws.
        """
        return self.partial_bounds[:, :1] - self.partial_bounds[:, 1:]


def score(
    model: HierarchicalVAE,
    batches: Iterable[IndexedImages],
    *,
    importance_samples: Iterable[int] = (),
    elbo_samples: int = 1,
    ratio_samples: int = 1,
    seed: int = 0,
    chunk: int = 256,
    progress: Progress | None = None,
    store: RecordStore | None = None,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> ScoreRecords:
    """The scores of single images; labels are not told, so they are of p(x).

    Noise depends on ``seed``, the image's index and the draw only: batch size, workers and devices
    change nothing but rounding. ELBO and importance-weighted bounds are those of
    :func:`nvae.evaluation.evaluate` with the same settings. An image takes ``max(K)`` top-down
    passes, and G + 1 for every draw of the ratios.

    Args:
        model: any mode; evaluated in eval mode and left as it was.
        batches: objects with ``x`` ``(B, C, H, W)`` in [0, 1] and ``index`` ``(B,)`` int64.
        importance_samples: values of K.
        elbo_samples: draws that ELBO, KL and reconstruction are averaged over.
        ratio_samples: draws that the L^{>k} are averaged over.
        seed: chooses the noise.
        chunk: rows in one pass.
        progress: called with the rows just done.
        store: finished images, of kind :class:`ScoreRecords`; those in it are not computed again.
        distributed: every rank calls this with its share of the images and gets the result of all.
        group: of the ranks; None: the default one.

    Raises:
        ValueError: no images, wrong sizes, impossible settings or a model in half precision.
        FloatingPointError: a number is not finite.
    """
    settings = ScoreSettings(
        tuple(importance_samples), elbo_samples, seed, chunk, ratio_samples=ratio_samples
    )
    if store is not None:
        groups, channels = model.num_groups, model.latent_channels
        store.check_shapes(groups, channels, len(settings.importance_samples))

    def compute(x: Tensor, index: Tensor, _: Tensor | None) -> ScoreRecords:
        return score_images(model, x, index, settings, progress)

    found = image_records(
        model, batches, compute, images_per_pass=settings.images_per_pass,
        rows_per_image=rows_per_image(model, settings), progress=progress, store=store,
        labels=False, distributed=distributed, group=group,
    )  # fmt: skip
    assert isinstance(found, ScoreRecords)
    return found


def rows_per_image(model: HierarchicalVAE, settings: ScoreSettings) -> int:
    """Top-down passes that one image takes: what :func:`score` reports as progress."""
    return settings.draws + settings.ratio_samples * (model.num_groups + 1)


def score_images(
    model: HierarchicalVAE,
    x: Tensor,
    index: Tensor,
    settings: ScoreSettings,
    progress: Progress | None = None,
) -> ScoreRecords:
    """Scores of images ``(B, C, H, W)``, best :attr:`ScoreSettings.images_per_pass` at a time.

    The model is in eval mode and the images are on its device; their noise depends on ``index``,
    ``(B,)`` int64.

    Raises:
        FloatingPointError: a number is not finite; the message names the image.
    """
    bounds = bound_images(model, x, index, settings, progress)
    partial = partial_bounds(model, x, index, settings, progress)
    is_finite = np.isfinite(partial).all(1)
    if not is_finite.all():
        bad = bounds.index[~is_finite][0]
        raise FloatingPointError(f"a partial bound of image {bad} is not a finite number")
    return ScoreRecords(**vars(bounds), partial_bounds=partial)


@torch.inference_mode()
def partial_bounds(
    model: HierarchicalVAE,
    x: Tensor,
    index: Tensor,
    settings: ScoreSettings,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """L^{>k} for k = 0 .. G, ``(B, G + 1)``, nats, of images as in :func:`score_images`.

    L^{>k} = E [log p(x | z)] - KL(q || p) of the G - k coarsest groups, which are drawn from the
    posterior; the k finest are drawn from the prior that those imply. All k share the posterior's
    draws and the prior's noise.
    """
    images, groups = len(x), model.num_groups
    encoder_maps = model.encode(x)
    index = index.to(x.device)
    keys = image_keys(index, seed=settings.seed, stream=STREAM_POSTERIOR)
    prior_keys = image_keys(index, seed=settings.seed, stream=STREAM_RATIO)
    sums = torch.zeros(images, groups + 1, dtype=torch.float64)
    step = max(1, settings.chunk // images)
    for start in range(0, settings.ratio_samples, step):
        draws = range(start, min(start + step, settings.ratio_samples))
        output, log_likelihood = decode_draws(model, x, encoder_maps, keys, draws, None)
        kl = output.kl_by_channel.double().sum(2).cumsum(1)  # of this group and all coarser ones
        latents: list[Tensor | None] = [group.z for group in output.groups]
        noise = noise_of_draws(model, prior_keys, draws, x.dtype)
        repeated = x.repeat_interleave(len(draws), dim=0)
        for kept in range(groups, -1, -1):
            if kept < groups:
                latents[kept] = None
                state, _ = model.top_down(noise, latents=latents)
                log_likelihood = model.likelihood(model.decode_state(state)).log_prob(repeated)
            bound = log_likelihood.double()
            if kept:
                bound = bound - kl[:, kept - 1]
            sums[:, groups - kept] += bound.view(images, len(draws)).sum(1).cpu()
        if progress is not None:
            progress(images * len(draws) * (groups + 1))
    return (sums / settings.ratio_samples).numpy()


@torch.inference_mode()
def log_likelihood_maps(
    model: HierarchicalVAE,
    x: Tensor,
    index: Tensor,
    *,
    elbo_samples: int = 1,
    seed: int = 0,
    chunk: int = 256,
) -> Tensor:
    """log p(x | z) of every counted pixel, all channels together: where in the image.

    A map's sum is minus the image's reconstruction, from the same draws as in :func:`score`.

    Args:
        model: any mode; evaluated in eval mode and left as it was.
        x: images ``(B, C, H, W)`` in [0, 1].
        index: ``(B,)`` int64, of their noise.
        elbo_samples: draws that the maps are averaged over.
        seed: as in :func:`score`, like ``chunk``.
        chunk: rows in one pass.

    Returns:
        ``(B, h, w)`` float64, nats, on the CPU; h and w are those of the counted window.

    Raises:
        ValueError: wrong sizes, or a likelihood that does not tell single pixels.
    """
    settings = BoundSettings((), elbo_samples, seed, chunk)
    model.check_images(x)
    rows, columns = model.config.counted_window
    maps = []
    with model.evaluating():
        for images, own in zip(
            x.to(model.device, model.dtype).split(settings.images_per_pass),
            index.to(model.device).split(settings.images_per_pass),
            strict=True,
        ):
            total = torch.zeros(len(images), *images.shape[-2:], dtype=torch.float64)
            encoder_maps = model.encode(images)
            keys = image_keys(own, seed=seed, stream=STREAM_POSTERIOR)
            for draws in settings.draw_ranges(len(images)):
                output, _ = decode_draws(model, images, encoder_maps, keys, draws, None)
                repeated = images.repeat_interleave(len(draws), dim=0)
                pixels = model.likelihood(output.logits).pixel_log_prob(repeated)
                pixels = pixels.double().sum(1).unflatten(0, (len(images), len(draws)))
                total += pixels.sum(1).cpu()
            maps.append((total / elbo_samples)[:, rows, columns])
    return torch.cat(maps)
