"""What every hierarchical VAE of this package is.

A model encodes an image into feature maps, walks top-down through its latent groups from the
coarsest to the finest, and turns the last state into the parameters of a pixel distribution.
Training, sampling, evaluation, coding and export talk to :class:`HierarchicalVAE` alone; a model
adds its layers, :meth:`~HierarchicalVAE.encode`, :meth:`~HierarchicalVAE.top_down` and
:meth:`~HierarchicalVAE.decode_state`.
"""

import copy
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from nvae.models.conditioning import NO_LABEL, ClassEmbedding, Condition, check_labels
from nvae.models.distributions import Normal
from nvae.models.folding import forget
from nvae.models.layers import is_autocast_on
from nvae.models.output import GroupSample, Output
from nvae.models.pixel_distribution import ImageConfig, PixelDistribution, build_likelihood
from nvae.ops import Impl

Temperature = float | Sequence[float]
Shape = tuple[int, int, int]
"""Of one image's latent in one group, ``(L, h, w)``."""
Choose = Callable[[int, Normal, Normal | None], Tensor]
"""Gives a group's z ``(B, L, h, w)`` from its index, its prior, and its posterior before any flow;
no posterior where nothing was encoded."""


class HierarchicalVAE(nn.Module, ABC):
    """Base class of all models.

    A subclass takes its configuration as the one argument, sets the three attributes, implements
    the abstract methods, and is named in :data:`nvae.models.MODELS` or as ``package.module:Class``
    in the configuration.

    Attributes:
        config_class: of the configuration, a frozen dataclass derived from :class:`ImageConfig`.
        config: the configuration.
        latent_shapes: shape ``(L, h, w)`` of every group's latent, coarsest first.
        classes: what labels add to the walk; of models that know classes alone.
        kernels: see :meth:`choose_kernels`.
    """

    kernels: Impl = "auto"
    config_class: ClassVar[type[ImageConfig]]
    config: ImageConfig
    latent_shapes: tuple[Shape, ...]
    classes: ClassEmbedding

    @classmethod
    def least_tensors(cls, config: Any) -> int:
        """A lower bound on the number of weights, worked out without making any."""
        del config
        return 1

    @abstractmethod
    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """The bottom-up pass: what :meth:`top_down` takes as ``encoder_maps``.

        Args:
            x: images in [0, 1], ``(B, C, H, W)``.
        """

    @abstractmethod
    def top_down(
        self,
        noise: Sequence[Tensor],
        *,
        encoder_maps: Sequence[Tensor] | None = None,
        latents: Sequence[Tensor | None] | None = None,
        temperature: Temperature = 1.0,
        condition: Condition | None = None,
        choose: Choose | None = None,
    ) -> tuple[Tensor, tuple[GroupSample, ...]]:
        """Walk through the groups, coarsest first.

        Args:
            noise: standard normal draws, one a group, each ``(B, L, h, w)``.
            encoder_maps: of :meth:`encode`: z is drawn from the posteriors. None: from the priors.
            latents: z itself for some or all groups; None entries are drawn, and so are groups
                after the last entry.
            temperature: factor on the priors' sigma, one number or one a group; only where z is
                drawn from a prior.
            condition: classes of the images; only models that know classes are given one.
            choose: asked for the z of every group instead, before the walk goes on; ``noise`` then
                says the batch size alone. Who needs no coding may leave this argument out.

        Returns:
            The state after the finest group, and what every group drew.
        """

    @abstractmethod
    def decode_state(self, state: Tensor) -> Tensor:
        """Final top-down state to likelihood parameters ``(B, K, H, W)``."""

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, each of which may be compiled."""
        return []

    def segments(self) -> list[nn.Module]:
        """What may be recomputed in the backward pass, each as a whole; none inside another.

        Their randomness must come in as arguments: they are run a second time.
        """
        return self.blocks()

    def training_pass(self) -> AbstractContextManager[AbstractContextManager[None]]:
        """Around a forward pass with gradients: what depends on the weights alone, done at once.

        Yields:
            A context for computing regularizers of the same weights, inside or afterwards.
        """
        return nullcontext(nullcontext())

    def choose_kernels(self, kernels: str) -> None:
        """Whether layers run as CUDA kernels: ``auto`` where they can, ``reference`` never.

        It is no part of the architecture, and in no checkpoint. ``cuda`` is ``auto`` here;
        :func:`~nvae.ops.library.check_kernels` asks a device for it. Layers of one's own take part
        by a class attribute ``kernels``.
        """
        chosen: Impl = "reference" if kernels == "reference" else "auto"
        for module in self.modules():
            if hasattr(type(module), "kernels"):
                module.kernels = chosen  # type: ignore[assignment]
        forget(self)  # what was folded for the other choice

    def without_encoder(self) -> Self:
        """A copy in evaluation mode that can only sample, without gradients."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block, every module's own mode again afterwards."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    @property
    def num_groups(self) -> int:
        """Latent groups, G."""
        return len(self.latent_shapes)

    @property
    def groups_per_scale(self) -> tuple[int, ...]:
        """Latent groups of each resolution in turn, coarsest first; they add up to G."""
        runs = itertools.groupby(self.latent_shapes, key=lambda shape: shape[1:])
        return tuple(len(list(run)) for _, run in runs)

    @property
    def latent_channels(self) -> int:
        """Channels L of a group's latent, of the widest group where they differ."""
        return max(shape[0] for shape in self.latent_shapes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(
        self, x: Tensor, noise: Sequence[Tensor] | None = None, labels: Tensor | None = None
    ) -> Output:
        """Encode ``x`` and decode a posterior sample.

        Args:
            x: images in [0, 1], ``(B, C, H, W)``; bits and binarization already applied.
            noise: standard normal draws, one a group, each ``(B, L, h, w)``, coarsest first;
                drawn here when absent.
            labels: classes ``(B,)`` int64, ``NO_LABEL`` for none; see :meth:`conditioned_by`.

        Raises:
            ValueError: if ``x``, ``noise`` or ``labels`` has the wrong shape, or ``x`` leaves
                [0, 1] or is of another type than the weights.
        """
        self.check_images(x)
        self.check_type(x)
        noise = self._noise(x.shape[0], noise)
        given = self.conditioned_by(labels, len(x))
        state, groups = self.top_down(noise, encoder_maps=self.encode(x), **given)
        return Output(self.decode_state(state), groups)

    def conditioned_by(
        self, labels: Tensor | None, batch: int, guidance: float = 1.0
    ) -> dict[str, Any]:
        """The argument of :meth:`top_down` that labels make: none where there are none.

        Args:
            labels: ``(B,)`` int64, classes counted from 0, or ``NO_LABEL``.
            batch: B.
            guidance: see :class:`~nvae.models.conditioning.Condition`.

        Raises:
            ValueError: the model knows no classes, or these are none of them.
        """
        check_labels(labels, self.config.num_classes, batch)
        if labels is None:
            return {}
        if not hasattr(self, "classes"):
            raise ValueError(f"{type(self).__name__} does not take labels; set model.num_classes=0")
        return {"condition": Condition(self.classes.rows(labels.to(self.device)), guidance)}

    def labels_in_turn(self, n: int) -> Tensor | None:
        """Labels ``(n,)`` that go through all classes; None where the model knows none."""
        classes = self.config.num_classes
        return torch.arange(n) % classes if classes else None

    def labels_of(self, batch: Any) -> Tensor | None:
        """What a batch of images has under ``labels``, where the model knows classes."""
        return getattr(batch, "labels", None) if self.config.num_classes else None

    def conditioned(
        self, state: Tensor, group: int, condition: Condition | None
    ) -> tuple[Tensor, float]:
        """For the walk of a model: the state ``(B, C, h, w)`` before a group with what the classes
        add, and the guidance of its prior."""
        if condition is None:
            return state, 1.0
        return self.classes(state, condition.rows, group), condition.guidance

    def draw_state(
        self,
        noise: Sequence[Tensor],
        temperature: Temperature = 1.0,
        labels: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """The state after the finest group of a draw from the prior.

        Args:
            noise: one ``(B, L, h, w)`` a group, coarsest first.
            temperature: as in :meth:`sample_logits`.
            labels: as in :meth:`forward`.
            guidance: how closely to follow the labels, >= 0. At 1 images are drawn from
                p(x | class), at 0 from p(x); above 1 they are more typical of their class, and
                take twice the time; see :func:`~nvae.models.conditioning.guided`.
        """
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}; it must be a finite number, 0 or more")
        if labels is None or guidance == 1:
            given = self.conditioned_by(labels, noise[0].shape[0])  # len is no size when traced
            return self.top_down(noise, temperature=temperature, **given)[0]
        both = torch.cat([labels, torch.full_like(labels, NO_LABEL)])
        given = self.conditioned_by(both, both.shape[0], guidance)
        twice = [torch.cat([eps, eps]) for eps in noise]
        state, _ = self.top_down(twice, temperature=temperature, **given)
        return state[: labels.shape[0]]

    def likelihood(self, logits: Tensor) -> PixelDistribution:
        """The distribution of images that ``logits`` ``(B, K, H, W)`` stand for."""
        return build_likelihood(self.config, logits)

    @torch.no_grad()
    def sample_logits(
        self,
        n: int,
        temperature: Temperature = 1.0,
        noise: Sequence[Tensor] | None = None,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Logits of ``n`` draws from the prior, ``(n, K, H, W)``.

        Args:
            n: number of images.
            temperature: factor on every prior's sigma, >= 0; one number or one a group.
            noise: as in :meth:`forward`.
            labels: ``(n,)``, as in :meth:`forward`.
            guidance: see :meth:`draw_state`.
        """
        return self.decode_state(
            self.draw_state(self._noise(n, noise), temperature, labels, guidance)
        )

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: Temperature = 1.0,
        *,
        pixel_temperature: float = 1.0,
        noise: Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``n`` images in [0, 1], ``(n, C, H, W)``.

        Args:
            n: number of images.
            temperature: of the latents, as in :meth:`sample_logits`.
            pixel_temperature: of the likelihood, >= 0; 0 takes its mode.
            noise: latent noise, as in :meth:`forward`.
            labels: ``(n,)``, as in :meth:`forward`.
            guidance: see :meth:`draw_state`.
            generator: source of the pixels' randomness, and of the latents' unless ``noise`` is
                given.
        """
        if noise is None:
            noise = self.draw_noise(n, generator)
        logits = self.sample_logits(n, temperature, noise, labels=labels, guidance=guidance)
        return self.likelihood(logits).sample(pixel_temperature, generator)

    def noise_shapes(self, n: int) -> list[tuple[int, int, int, int]]:
        """Shape ``(n, L, h, w)`` of every group's noise, coarsest first."""
        return [(n, *shape) for shape in self.latent_shapes]

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Standard normal noise for ``n`` images, one tensor a group, coarsest first."""
        return [
            torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
            for shape in self.noise_shapes(n)
        ]

    def _noise(self, n: int, noise: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if noise is None:
            return self.draw_noise(n)
        shapes = self.noise_shapes(n)
        if len(noise) != len(shapes):
            raise ValueError(f"noise for {len(noise)} groups, the model has {len(shapes)}")
        for group, (eps, shape) in enumerate(zip(noise, shapes, strict=True)):
            if not isinstance(eps, Tensor):
                raise ValueError(f"noise of group {group} is {type(eps).__name__}, not a tensor")
            if tuple(eps.shape) != shape:
                raise ValueError(
                    f"noise of group {group} has shape {tuple(eps.shape)}, the model takes {shape}"
                )
        return noise

    def group_temperatures(self, temperature: Temperature) -> list[float]:
        """One temperature a group, coarsest first.

        Numbers of NumPy and of torch are numbers too, alone and in a sequence.

        Raises:
            ValueError: not one or one a group, no number, below 0, or not finite.
        """
        groups, given = self.num_groups, cast(Any, temperature)
        if not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
            given = [given] * groups
        if len(given) != groups:
            raise ValueError(f"{len(given)} temperatures for {groups} latent groups")
        temperatures = []
        for each in given:
            try:
                value = math.nan if isinstance(each, str) else float(each)
            except (TypeError, ValueError, RuntimeError):
                value = math.nan
            if not 0 <= value < math.inf:
                raise ValueError(f"temperature is {each!r}; it must be a finite number, 0 or more")
            temperatures.append(value)
        return temperatures

    def group_latents(self, latents: Sequence[Tensor | None] | None) -> list[Tensor | None]:
        """One z or None a group, coarsest first; None stands for groups after the last one given.

        Raises:
            ValueError: more of them than groups, or one of another shape than its group's.
        """
        given = [] if latents is None else list(latents)
        missing = self.num_groups - len(given)
        if missing < 0:
            raise ValueError(f"{len(given)} latents for {self.num_groups} latent groups")
        for group, (z, shape) in enumerate(zip(given, self.latent_shapes, strict=False)):
            if z is not None and tuple(z.shape[1:]) != shape:
                raise ValueError(
                    f"the latent of group {group} has shape {tuple(z.shape)}, the model takes "
                    f"(B, {', '.join(map(str, shape))})"
                )
        return given + [None] * missing

    def check_images(self, x: Tensor) -> None:
        """Raise a ValueError unless ``x`` is ``(B, C, H, W)`` of the model's C, H and W, in [0, 1].

        While training, the range is left to :meth:`check_range`: to look at it would make every
        step wait for the device.
        """
        wanted = self.config.image_shape
        if x.ndim != 4 or tuple(x.shape[1:]) != wanted:
            raise ValueError(
                f"images have shape {tuple(x.shape)}, the model takes "
                f"(B, {', '.join(map(str, wanted))})"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"images are {x.dtype}, the model takes floating-point numbers in [0, 1]"
            )
        is_traced = torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta
        if not (self.training or is_traced):
            self.check_range(x)

    def check_type(self, x: Tensor) -> None:
        """Raise a ValueError unless ``x`` has the type of the weights, or autocast chooses types.

        Evaluation and sampling convert images themselves.
        """
        if torch.compiler.is_compiling() or is_autocast_on(x):
            return
        if x.dtype != self.dtype:
            raise ValueError(
                f"images are {x.dtype}, the model is {self.dtype}; convert one of them with "
                f".to({self.dtype}) or .to({x.dtype})"
            )

    def check_range(self, x: Tensor) -> None:
        """Raise a ValueError unless all of ``x`` is in [0, 1]; waits for the device.

        While training, numbers that are not finite pass: they make a bad step, and those are left
        out.
        """
        if not x.numel():
            return
        low, high = (float(bound) for bound in x.detach().aminmax())
        if self.training and not (math.isfinite(low) and math.isfinite(high)):
            return
        if not (low >= 0 and high <= 1):  # a NaN fails both
            raise ValueError(
                f"images lie between {low:.8g} and {high:.8g}, the model takes numbers in [0, 1]"
            )
