"""Latents of images and seeds: encode, decode, and paths between them.

A latent is written in two ways. ``z`` is what the decoder reads. ``noise`` are its coordinates
under the prior, (z - mu_p) / sigma_p with the prior that the coarser groups imply: the noise that
sampling would have needed to draw just this z. In these coordinates images and seeds live in one
space where every group is standard normal, so paths are drawn there.
"""

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nvae.models import HierarchicalVAE, Temperature
from nvae.models.output import GroupSample
from nvae.random import STREAM_POSTERIOR, STREAM_TRAVERSE, image_keys, latent_noise
from nvae.sampling.prior import PixelTemperature, check_pixel_temperature, render, seed_noise


@dataclass(frozen=True)
class Latents:
    """Latents of B images; groups coarsest first.

    Attributes:
        z: one ``(B, L, h, w)`` a group.
        noise: the same latents as coordinates under the prior, same shapes.
        labels: classes ``(B,)`` int64 that they were made with and are decoded with; None: none.
    """

    z: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.z[0])

    def __getitem__(self, rows: slice) -> "Latents":
        """Some of the images."""
        return self._each(lambda group: group[rows])

    def repeat(self, times: int) -> "Latents":
        """Every image ``times`` times in a row, ``(B * times, ...)``."""
        return self._each(lambda group: group.repeat_interleave(times, dim=0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Latents":
        labels = None if self.labels is None else change(self.labels)
        return Latents(tuple(map(change, self.z)), tuple(map(change, self.noise)), labels)


def concatenate(parts: Sequence[Latents]) -> Latents:
    """All images of ``parts``, in order."""
    labels = [part.labels for part in parts if part.labels is not None]
    return Latents(
        tuple(torch.cat(group) for group in zip(*(p.z for p in parts), strict=True)),
        tuple(torch.cat(group) for group in zip(*(p.noise for p in parts), strict=True)),
        torch.cat(labels) if labels else None,
    )


@torch.no_grad()
def encode(
    model: HierarchicalVAE,
    x: Tensor,
    seeds: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    batch_size: int = 64,
) -> Latents:
    """Latents of images.

    Like all functions here it takes a model in any mode and leaves it as it was.

    Args:
        model: encodes them.
        x: ``(B, C, H, W)`` in [0, 1], on the model's device.
        seeds: ``(B,)`` int64 for a draw from the posterior, one seed an image; None for the
            posterior's mean at every group.
        labels: classes ``(B,)`` int64; see :meth:`HierarchicalVAE.conditioned_by`.
        batch_size: images in one pass.

    Raises:
        ValueError: ``x`` has the wrong shape, or leaves [0, 1].
    """
    model.check_images(x)
    parts = []
    with model.evaluating():
        for rows in _slices(len(x), batch_size):
            images = x[rows].to(model.dtype)
            if seeds is None:
                noise = [images.new_zeros(shape) for shape in model.noise_shapes(len(images))]
            else:
                keys = image_keys(seeds[rows].to(x.device), seed=0, stream=STREAM_POSTERIOR)
                noise = latent_noise(keys, model.latent_shapes, images.dtype)
            own = None if labels is None else labels[rows]
            given = model.conditioned_by(own, len(images))
            _, groups = model.top_down(noise, encoder_maps=model.encode(images), **given)
            parts.append(_latents(groups, own))
    return concatenate(parts)


def prior_latents(
    model: HierarchicalVAE,
    seeds: Tensor,
    temperature: Temperature = 1.0,
    labels: Tensor | None = None,
) -> Latents:
    """Latents of seeds ``(B,)``, and classes if any: those that :func:`sample_images` draws."""
    return from_noise(model, seed_noise(model, seeds), temperature, labels=labels)


@torch.no_grad()
def from_noise(
    model: HierarchicalVAE,
    noise: Sequence[Tensor],
    temperature: Temperature = 1.0,
    z: Sequence[Tensor | None] | None = None,
    *,
    labels: Tensor | None = None,
    batch_size: int = 64,
) -> Latents:
    """Latents of coordinates under the prior.

    Args:
        model: the latents' own.
        noise: coordinates under the prior, one ``(B, L, h, w)`` a group.
        temperature: factor on the priors' sigma.
        z: latents that are given, for some groups; the others come from ``noise``.
        labels: classes ``(B,)`` int64; None: none.
        batch_size: images in one pass.
    """
    parts = []
    with model.evaluating():
        for rows in _slices(len(noise[0]), batch_size):
            eps = [e[rows] for e in noise]
            given = None if z is None else [None if group is None else group[rows] for group in z]
            own = None if labels is None else labels[rows]
            walk = partial(model.top_down, eps, **model.conditioned_by(own, len(eps[0])))
            _, groups = walk(latents=given, temperature=temperature)
            if temperature != 1.0:  # the coordinates are those under the prior at temperature 1
                _, groups = walk(latents=[group.z for group in groups])
            parts.append(_latents(groups, own))
    return concatenate(parts)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _latents(groups: Sequence[GroupSample], labels: Tensor | None) -> Latents:
    return Latents(
        tuple(group.z for group in groups),
        tuple((group.z - group.prior.mean) / group.prior.sigma for group in groups),
        labels,
    )


@torch.no_grad()
def decode(
    model: HierarchicalVAE,
    latents: Latents,
    pixel_temperature: PixelTemperature = "mean",
    *,
    seeds: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Images of latents.

    Args:
        model: the latents' own.
        latents: B of them.
        pixel_temperature: factor on the pixel noise, or ``"mean"``; 0 takes the mode.
        seeds: ``(B,)`` int64, of the pixel noise; None counts from 0.
        batch_size: images in one pass.

    Returns:
        ``(B, C, H, W)`` in [0, 1], on the CPU.
    """
    check_pixel_temperature(pixel_temperature)
    if seeds is None:
        seeds = torch.arange(len(latents))
    images = []
    with model.evaluating():
        for rows in _slices(len(latents), batch_size):
            part = latents[rows]
            given = model.conditioned_by(part.labels, len(part))
            state, _ = model.top_down(part.noise, latents=part.z, **given)
            logits = model.decode_state(state)
            images.append(render(model, logits, seeds[rows], pixel_temperature).cpu())
    return torch.cat(images)


def interpolate(model: HierarchicalVAE, start: Latents, end: Latents, steps: int) -> Latents:
    """Paths from one image to another, spherical in the prior's noise.

    Args:
        model: the latents' own.
        start: B latents.
        end: B latents.
        steps: points on every path, both ends included; at least 2.

    Returns:
        ``B * steps`` latents, path by path. A path between two classes changes at half its way.

    Raises:
        ValueError: fewer than 2 steps, unequal numbers of ends, or labels at one end alone.
    """
    _check_steps("a path", steps)
    if len(start) != len(end):
        raise ValueError(f"{len(start)} starts for {len(end)} ends; give as many")
    labels = None
    if start.labels is not None and end.labels is not None:
        nearer = torch.arange(steps, device=start.labels.device) < steps / 2
        labels = torch.where(nearer, start.labels[:, None], end.labels[:, None]).flatten()
    elif start.labels is not end.labels:
        raise ValueError("one end has labels and the other has none")
    position = torch.linspace(0, 1, steps)
    noise = [
        torch.stack([slerp(a, b, float(t)) for t in position], dim=1).flatten(0, 1)
        for a, b in zip(start.noise, end.noise, strict=True)
    ]
    return from_noise(model, noise, labels=labels)


def _check_steps(what: str, steps: int) -> None:
    if not isinstance(steps, numbers.Integral) or steps < 2:
        raise ValueError(f"steps is {steps}; {what} needs at least 2")


def slerp(start: Tensor, end: Tensor, position: float) -> Tensor:
    """Point between two batches of vectors, on the sphere.

    The direction moves along the great circle, the length linearly: noise of a high dimension
    lies in a thin shell, which a straight line would leave.

    ``start`` and ``end`` are ``(B, ...)``. ``position`` 0 gives ``start``, 1 gives ``end``; beyond
    them the circle goes on.

    Raises:
        ValueError: ``position`` is not finite.
    """
    if not math.isfinite(position):
        raise ValueError(f"position is {position}; it must be a finite number")
    a, b = start.flatten(1), end.flatten(1)
    tiny = torch.finfo(a.dtype).tiny
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    unit_a, unit_b = a / length_a.clamp(min=tiny), b / length_b.clamp(min=tiny)
    angle = torch.acos((unit_a * unit_b).sum(1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(angle)
    # parallel and opposite ends have no one great circle, and the formula is 0/0 there
    straight = sine < 1e-4
    safe = torch.where(straight, torch.ones_like(sine), sine)
    weight_a = torch.where(straight, 1 - position, torch.sin((1 - position) * angle) / safe)
    weight_b = torch.where(straight, position, torch.sin(position * angle) / safe)
    length = (1 - position) * length_a + position * length_b
    return (length * (weight_a * unit_a + weight_b * unit_b)).view_as(start)


def check_kept(keep: int, groups: int) -> None:
    """Raise a ValueError unless a model of so many groups can keep the ``keep`` coarsest."""
    if not 0 <= keep <= groups:
        raise ValueError(f"keep is {keep}; the model has {groups} groups, allowed: 0 to {groups}")


def check_group(group: int, groups: int) -> None:
    """Raise a ValueError unless a model of so many groups has this one."""
    if not 0 <= group < groups:
        raise ValueError(f"group is {group}; allowed: 0 (coarsest) to {groups - 1}")


def resample_finer(
    model: HierarchicalVAE,
    latents: Latents,
    keep: int,
    seeds: Tensor,
    temperature: Temperature = 1.0,
) -> Latents:
    """Keep the ``keep`` coarsest groups, 0 to G, and draw the others from the prior.

    ``seeds`` ``(B,)``, int64, and ``temperature`` are of the groups that are drawn.

    Raises:
        ValueError: ``keep`` is not a number of groups.
    """
    groups = len(latents.z)
    check_kept(keep, groups)
    given = [*latents.z[:keep], *([None] * (groups - keep))]
    noise = seed_noise(model, seeds)
    return from_noise(model, noise, temperature, given, labels=latents.labels)


def traverse(
    model: HierarchicalVAE, latents: Latents, group: int, steps: int, seeds: Tensor
) -> Latents:
    """Move one group along a half circle, every other group's coordinates fixed.

    The group's noise e goes to cos(a) |e| e' + sin(a) |e| d, with e' its direction, d a random
    direction at right angles and a from 0 to pi: the length stays, and the last point is the
    first one's opposite.

    Args:
        model: the latents' own.
        latents: B of them.
        group: 0 (coarsest) to G - 1.
        steps: points on the half circle; at least 2.
        seeds: ``(B,)`` int64, of the directions.

    Returns:
        ``B * steps`` latents, image by image.

    Raises:
        ValueError: no such group, fewer than 2 steps, or a group of a single number.
    """
    check_group(group, len(latents.z))
    _check_steps("a traversal", steps)
    start = latents.noise[group]
    if start[0].numel() < 2:
        raise ValueError(f"group {group} is a single number; there is no circle to turn on")
    keys = image_keys(seeds.to(start.device), seed=group, stream=STREAM_TRAVERSE)
    aside = latent_noise(keys, [tuple(start.shape[1:])], start.dtype)[0]
    e, d = start.flatten(1), aside.flatten(1)
    length = e.norm(dim=1, keepdim=True)
    unit = e / length.clamp(min=torch.finfo(e.dtype).tiny)
    d = d - (d * unit).sum(1, keepdim=True) * unit
    d = d * (length / d.norm(dim=1, keepdim=True))
    angles = torch.linspace(0, torch.pi, steps, device=e.device, dtype=e.dtype).view(1, -1, 1)
    moved = (angles.cos() * e[:, None] + angles.sin() * d[:, None]).flatten(0, 1)
    repeated = latents.repeat(steps)
    noise = list(repeated.noise)
    noise[group] = moved.view(-1, *start.shape[1:])
    return from_noise(model, noise, labels=repeated.labels)
