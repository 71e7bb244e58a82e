"""Optimizers that can leave a bad step out.

The guard decides on the device whether a step is bad and tells the optimizer by its attribute
``found_inf``, a 0-d tensor: 1 leaves parameters and state as they are. Our Adamax and torch's fused
optimizers look at it on the device; every other one is wrapped in :class:`HostSwitch`.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nvae.ops.adamax import move
from nvae.ops.library import Impl, has_kernels, ops
from nvae.settings import Registry, check_arguments, check_choice, check_fields

APEX_OPTIMIZERS = {"apex_fused_adam": "FusedAdam", "apex_fused_lamb": "FusedLAMB"}
_BUILD_APEX = (
    "build NVIDIA's: git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install --no-build-isolation ./apex (docker/Dockerfile does)"
)


@dataclass
class OptimizerConfig:
    """Which optimizer, and its learning rate over time.

    Attributes:
        name: ``adamax`` (the paper's) | ``adamw`` | ``apex_fused_adam`` | ``apex_fused_lamb``, or
            any other as ``package.module:Class``, such as ``torch.optim:SGD``. The settings below
            are given to the class where it has arguments of those names.
        learning_rate: after warm-up (`lr`).
        min_learning_rate: at the end.
        warmup_epochs: epochs of linear warm-up, step by step; at most half of the run.
        warmup_steps: optimizer steps of it in the place of epochs; null: by `warmup_epochs`.
        decay_start: share of the run at which the rate begins to fall. Up to there it is constant;
            then it follows a cosine whose clock began with the run, as Efficient-VDVAE's does.
            null: the cosine begins at the end of the warm-up.
        decay_end: share of the run at which the minimum is reached, to stay.
        decay_every: ``step`` or ``epoch``: how often the cosine is advanced.
        beta1: decay of the first moment (of `betas`).
        beta2: decay of the second moment (Adamax: of the infinity norm).
        epsilon: keeps the denominator from 0 (`eps`).
        weight_decay: Adamax adds it to the gradient (L2), AdamW shrinks the weights.
        arguments: further ones of the class, such as ``{momentum: 0.9}``.
        schedule: null: warm-up and cosine as above. Else ``_target_`` names a class of
            ``torch.optim.lr_scheduler`` or one like them; beside it stand its arguments, and
            Lightning's ``interval`` (``step`` | ``epoch``), ``frequency`` and ``monitor``. An
            argument ``total_steps`` that is not given is the length of the run.
    """

    name: str = "adamax"
    learning_rate: float = 1e-2
    min_learning_rate: float = 1e-4
    warmup_epochs: float = 5.0
    warmup_steps: int | None = None
    decay_start: float | None = None
    decay_end: float = 1.0
    decay_every: str = "step"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-3
    weight_decay: float = 3e-4
    arguments: dict[str, Any] = field(default_factory=dict)
    schedule: Any = None

    def __post_init__(self) -> None:
        check_fields(
            self, "optimizer.", learning_rate=(None, 1000), min_learning_rate=(0, None),
            warmup_epochs=(0, None), warmup_steps=(0, None), decay_start=(0, 1), decay_end=(0, 1),
            epsilon=(None, 1), weight_decay=(0, 1000),
        )  # fmt: skip
        check_choice("optimizer.decay_every", self.decay_every, ("step", "epoch"))
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate is {self.min_learning_rate}; allowed: 0 to "
                f"learning_rate={self.learning_rate}"
            )
        if self.decay_end <= (self.decay_start or 0):
            raise ValueError(
                f"optimizer.decay_end is {self.decay_end}; it must be above "
                f"decay_start={self.decay_start or 0}"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}; allowed: 0 up to, not with, 1"
                )
        kind = optimizer_class(self.name)
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"optimizer: {self.name} evaluates the loss several times a step, which is not "
                "done here; take another"
            )
        check_arguments(kind, self.arguments, "optimizer.arguments.")
        try:  # the class alone knows what its arguments may be
            build_optimizer(self, [nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"optimizer: {self.name} does not take these arguments: {error}"
            ) from None
        if self.schedule is not None:
            self.schedule_class()

    @classmethod
    def from_target(cls, settings: dict[str, Any]) -> "OptimizerConfig":
        """An optimizer as Hydra users write it: ``_target_``, its own arguments, ``lr`` among them.

        What is not given is the class's default. Beside its arguments may stand the settings of the
        learning rate over time; the cosine ends at a hundredth of ``lr``.

        Raises:
            ValueError: one line that names what cannot be.
        """
        given = dict(settings)
        name = _class_name(given.pop("_target_"))
        kind = optimizer_class(name)
        known = inspect.signature(kind).parameters
        over_time = ("min_learning_rate", "warmup_epochs", "warmup_steps", "decay_start",
                     "decay_end", "decay_every", "schedule")  # fmt: skip
        ours = {key: given.pop(key) for key in over_time if key in given}
        rate = given.pop("lr", known["lr"].default if "lr" in known else None)
        if not isinstance(rate, int | float):
            raise ValueError(f"optimizer.lr={rate} is not a number; give the learning rate")
        # what ours would set otherwise
        defaults = {
            key: known[key].default for key in ("betas", "eps", "weight_decay") if key in known
        }
        ours = {"min_learning_rate": rate / 100, **ours}
        check_arguments(kind, given, "optimizer.")
        return cls(name=name, learning_rate=float(rate), arguments=defaults | given, **ours)

    def schedule_class(self) -> tuple[type[LRScheduler], dict[str, Any], dict[str, Any]]:
        """Class, arguments and Lightning's entries of ``schedule``.

        Raises:
            ValueError: one line that names what cannot be.
        """
        if not isinstance(self.schedule, dict):
            raise ValueError(
                f"optimizer.schedule={self.schedule!r}: it takes a group with _target_, or null"
            )
        arguments = dict(self.schedule)
        kind = SCHEDULES[_class_name(arguments.pop("_target_", ""))]
        ours: list[str] = [
            name for name in ("interval", "frequency", "monitor") if name in arguments
        ]
        lightning: dict[str, Any] = {name: arguments.pop(name) for name in ours}
        check_choice("optimizer.schedule.interval", lightning.get("interval", "epoch"),
                     ("step", "epoch"))  # fmt: skip
        check_arguments(kind, arguments, "optimizer.schedule.")
        return kind, arguments, lightning


def _class_name(target: object) -> str:
    """``package.module:Class`` of a ``_target_``, which has a dot in the colon's place."""
    name = str(target)
    return name if ":" in name else ":".join(name.rsplit(".", 1))


class HostSwitch(Optimizer):
    """Mixed into optimizers that the device cannot switch off: here the host asks it, and waits."""

    found_inf: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, then the step unless ``found_inf`` is set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch's unfused optimizers insist that they were not given a flag they would ignore
        flag, self.found_inf = self.found_inf, None
        if flag is None or not bool(flag):
            super().step()
        self.found_inf = flag
        return loss


def host_switched(kind: type[Optimizer]) -> type[Optimizer]:
    """``kind``, made to honour ``found_inf``."""
    return type(f"HostSwitched{kind.__name__}", (HostSwitch, kind), {})


@dataclass(frozen=True)
class WeightAverages:
    """Moving averages of weights.

    Attributes:
        of: the average of every parameter, of its shape and layout.
        share: 1 - decay, 0-d float64 on the parameters' device, where every step reads it.
    """

    of: dict[Tensor, Tensor]
    share: Tensor


class Adamax(Optimizer):
    """Adam with the infinity norm (Kingma & Ba 2015, algorithm 2), in foreach operations.

    torch's own decides on the host, so leaving a bad step out would mean waiting for the device at
    every step; here the decision is a tensor, as in torch's fused Adam. Arithmetic and defaults are
    torch's (a test compares them); the step count is one tensor a group, not one a parameter.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the first moment and of the infinity norm.
        eps: added to \\|gradient\\| before the maximum is taken.
        weight_decay: added to the gradient, times the weight (L2).
    """

    found_inf: Tensor | None = None
    """0-d float tensor, set before a step: 1 leaves parameters and state as they are."""
    kernels: Impl = "auto"
    """``reference``: never by the kernel."""
    moving: WeightAverages | None = None
    """Moved by every step, in the pass that updates the weights."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; the gradients are overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        if self.moving is not None:
            self._move_the_rest(self.moving)
        return loss

    @torch.no_grad()
    def _move_the_rest(self, moving: WeightAverages) -> None:
        """Weights without a gradient stay, and their averages come closer."""
        rest = [p for p in moving.of if p.grad is None]
        if rest:
            share = moving.share if self.found_inf is None else moving.share * (1 - self.found_inf)
            move([moving.of[p] for p in rest], rest, share)

    @property
    def moves_averages(self) -> bool:
        """Whether the kernel makes every step, and so can take moving averages along."""
        if type(self) is not Adamax or self.kernels == "reference":  # Muon has steps of its own
            return False
        return all(has_kernels(p.device) for group in self.param_groups for p in group["params"])

    def _state_of(self, parameters: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        for p in parameters:
            if not self.state[p]:
                for name in ("exp_avg", "exp_inf"):
                    self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return (
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_inf"] for p in parameters],
        )

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        averages, norms = self._state_of(parameters)
        device = averages[0].device
        if "step" not in group:
            group["step"] = torch.zeros((), dtype=torch.float64, device=device)
        group["step"] = group["step"].to(device)
        rate = group["lr"]  # a tensor where the step is captured
        if not isinstance(rate, Tensor):
            rate = torch.full((), rate, dtype=torch.float64, device=device)
        ops(self.kernels).adamax_(
            parameters, [p.grad for p in parameters], averages, norms, group["step"],
            rate, self.found_inf, *group["betas"], group["eps"], group["weight_decay"],
            [] if self.moving is None else [self.moving.of[p] for p in parameters],
            None if self.moving is None else self.moving.share,
        )  # fmt: skip


def _apex_class(name: str) -> type[Optimizer]:
    """One of apex's fused optimizers.

    Raises:
        ValueError: there is no apex, it is PyPI's unrelated package of that name, it was built
            without its CUDA extension, or there is no GPU.
    """
    setting = f"optimizer.name={name}"
    if importlib.util.find_spec("apex") is None:
        raise ValueError(f"{setting} needs NVIDIA apex, which is not installed; {_BUILD_APEX}")
    try:
        found: type[Optimizer] = getattr(
            importlib.import_module("apex.optimizers"), APEX_OPTIMIZERS[name]
        )
    except (ImportError, AttributeError):
        raise ValueError(
            f"{setting} needs NVIDIA apex, but the installed package named apex is "
            f"another one (PyPI's is unrelated): pip uninstall apex, then {_BUILD_APEX}"
        ) from None
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            f"{setting} needs apex's CUDA extension (amp_C), which was not built; {_BUILD_APEX}"
        )
    if not torch.cuda.is_available():
        raise ValueError(f"{setting} needs a GPU; on the CPU: adamax or adamw")
    return found


OPTIMIZERS: Registry[type[Optimizer]] = Registry(
    "optimizer.name",
    Optimizer,
    {"adamax": Adamax, "adamw": AdamW, **dict.fromkeys(APEX_OPTIMIZERS, Optimizer)},
)
SCHEDULES: Registry[type[LRScheduler]] = Registry("optimizer.schedule._target_", LRScheduler, {})


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that ``optimizer.name`` means; a ValueError where it cannot be used."""
    return _apex_class(name) if name in APEX_OPTIMIZERS else OPTIMIZERS[name]


def build_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[nn.Parameter],
    *,
    fused: bool = True,
    kernels: Impl = "auto",
) -> Optimizer:
    """The optimizer that ``config`` names; it honors ``found_inf``, see the top of the file.

    Args:
        config: see :class:`OptimizerConfig`.
        parameters: to be trained.
        fused: AdamW runs in one kernel and asks nobody. Not with float16, whose loss scaler has to
            see the gradients before a fused step could.
        kernels: the model's; ``reference`` keeps Adamax from its kernel.
    """
    kind = optimizer_class(config.name)
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    known = inspect.signature(kind).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    if config.name == "adamw":
        arguments["fused"] = fused
    arguments |= config.arguments
    if kind is not Adamax and not arguments.get("fused"):
        kind = host_switched(kind)
    optimizer = kind(list(parameters), **arguments)
    if fused and arguments.get("fused"):
        # its step could undo a loss scale, so that Lightning clips no gradients; there is none
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if isinstance(optimizer, Adamax):
        optimizer.kernels = kernels
    return optimizer
