"""A training step as one CUDA graph, replayed: the host starts one launch instead of thousands.

:class:`CapturedSteps` is a callback; ``trainer.cuda_graph`` adds it, a notebook may::

    pl.Trainer(callbacks=[CapturedSteps()])

It lets the module do a whole step (:class:`~nvae.training.whole_step.WholeStep`) in Lightning's
``training_step``; Lightning's loop goes on as before around it, with nothing left to do for its
backward pass, its zeroing and its optimizer step. Without Lightning::

    step = CapturedStep(WholeStep(model, objective, optimizer), CudaGraphs(device))
    for number in range(1, 201):
        loss = step(StepInput(x, noise, index), StepPosition(number - 1, 200, number))

``CapturedStep(..., None)`` is the same step uncaptured.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from nvae.command_line import brief
from nvae.models.folding import forget
from nvae.objective import Loss, Objective
from nvae.ops.multi_tensor import tables_of_capture
from nvae.training.guard import guard_of
from nvae.training.module import NVAELightning
from nvae.training.whole_step import StepInput, StepPosition, WholeStep, reads_device

WARM_UPS = 3
"""Times that a kind of micro-batch runs before it is captured: real steps, in which kernels are
compiled, libraries choose their algorithms, and what reads the device at first has read it."""

RAREST = 10
"""A kind that is less than one in so many micro-batches, such as an epoch's last, is not worth a
graph's memory."""

GRADIENT_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
STEP_HOOKS = (
    "training_step", "backward", "optimizer_step", "optimizer_zero_grad",
    "configure_gradient_clipping", "on_before_zero_grad", *GRADIENT_HOOKS,
)  # fmt: skip

Replay = Callable[[], None]
Kind = tuple[torch.Size, bool, bool, bool]
"""Shape of the images, and whether it begins a step, ends it, and is regularized."""


class Graphs(Protocol):
    """What captures and replays; :class:`CudaGraphs`, or a test's."""

    def run(self, function: Callable[[], Loss]) -> Loss:
        """Call it where its capture will be."""

    def capture(self, function: Callable[[], Loss]) -> tuple[Loss, Replay]:
        """What it returns, whose tensors every replay fills, and what replays it."""


class CudaGraphs:
    """CUDA graphs of one device that share their memory; one side stream runs and captures.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Loss]) -> Loss:
        """On the side stream, before and after which the current one waits: what a first call
        makes (workspaces, gradients' nodes) belongs to a stream."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = function()
        here.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Loss]) -> tuple[Loss, Replay]:
        """Nothing is computed yet: the first replay does."""
        graph = torch.cuda.CUDAGraph()
        # Where a capture fails, torch.cuda.graph leaves its stream the current one: the outermost
        # context puts this one back. Loader threads may pin memory meanwhile, which the stricter
        # mode forbids to all.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            tables_of_capture(self._device) as tables,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            result = function()
        return result, partial(_replay, graph, tables.memory)


def _replay(graph: torch.cuda.CUDAGraph, tables: Tensor) -> None:
    del tables  # which the graph's kernels read: whoever can replay it holds them
    graph.replay()


@dataclass
class _Captured:
    loss: Loss
    replay: Replay
    fixed: dict[str, Any]


class CapturedStep:
    """Whole steps, from the few graphs that they need and as they are otherwise.

    A kind of micro-batch (:data:`Kind`) that comes often is captured after :data:`WARM_UPS`; others
    run as they are, so a smaller last batch is no special case. Beta below 1 and beta = 1 are
    one graph: the device decides whether groups are balanced. What cannot be captured after all is
    one line on stderr, and training goes on as it is; nothing of the step is lost, since a capture
    computes nothing.

    Args:
        step: what to do.
        graphs: None: capture nothing.
        say: takes the line.

    Attributes:
        replays: micro-batches that were replayed.
    """

    def __init__(
        self, step: WholeStep, graphs: Graphs | None, say: Callable[[str], None] | None = None
    ) -> None:
        self._step, self._graphs = step, graphs
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._static: dict[torch.Size, StepInput] = {}
        self._schedule: Tensor | None = None
        self._count: dict[Kind, int] = {}
        self._captured: dict[Kind, _Captured] = {}
        self._state: list[Tensor] = []  # weights and statistics, which a replay may write
        self.replays = 0

    def __call__(self, batch: StepInput, at: StepPosition) -> Loss:
        """Do a micro-batch. The loss's tensors are overwritten by the next one of its kind.

        Args:
            batch: on the device; copied.
            at: where it is.
        """
        static, schedule = self._fill(batch, at)

        def function() -> Loss:
            return self._step(static, schedule, at)

        kind: Kind = (batch.x.shape, at.is_first, at.is_last, at.regularize)
        self._count[kind] = self._count.get(kind, 0) + 1
        if self._is_due(kind):
            self._capture(kind, function)
        found = self._captured.get(kind)
        if found is not None and found.fixed != self._step.fixed():
            self.stop("the optimizer's schedule moves more than the learning rate")
            found = None
        if found is None:
            return function() if self._graphs is None else self._graphs.run(function)
        found.replay()
        # autograd does not see what a graph writes, and by their versions evaluation knows whether
        # what it has derived from the weights is still of them
        increment_version(self._state)
        self.replays += 1
        return replace(found.loss, coefficients=self._step.coefficients(at))

    def _fill(self, batch: StepInput, at: StepPosition) -> tuple[StepInput, Tensor]:
        """Copy what changes to where the graphs read it; the host does not wait."""
        shape, on_gpu = batch.x.shape, batch.x.is_cuda
        if shape not in self._static:
            self._static[shape] = batch.like()
        static = self._static[shape]
        *images, index = batch.tensors()
        *static_images, static_index = static.tensors()
        torch._foreach_copy_(static_images, images)
        static_index.copy_(index)
        # from new pinned memory: the copies of earlier steps may still be under way
        values = torch.tensor(
            self._step.schedule(at), dtype=torch.float64, device="cpu", pin_memory=on_gpu
        )
        if self._schedule is None:
            self._schedule = torch.empty_like(values, device=batch.x.device)
        return static, self._schedule.copy_(values, non_blocking=True)

    def _is_due(self, kind: Kind) -> bool:
        if self._graphs is None or kind in self._captured:
            return False
        count = self._count[kind]
        return count > WARM_UPS and count * RAREST >= sum(self._count.values())

    def _capture(self, kind: Kind, function: Callable[[], Loss]) -> None:
        assert self._graphs is not None
        try:
            loss, replay = self._graphs.capture(function)
        except Exception as error:  # whatever it is, the step itself may well work
            self.stop(brief(error, 200))
            return
        self._captured[kind] = _Captured(loss, replay, self._step.fixed())
        self._state = [*self._step.model.parameters(), *self._step.model.buffers()]
        if len(self._captured) == 1:
            self._say("note: training steps are replayed from a CUDA graph from here on")

    def stop(self, reason: str) -> None:
        """Capture no more, and say why, once; steps go on as they are."""
        if self._graphs is not None:
            self._say(not_captured(reason))
        self._graphs = None
        self._captured.clear()

    def forget(self) -> None:
        """Other parameters are trained than before: warm up and capture anew."""
        self._step.forget_gradients()
        self._captured.clear()
        self._count.clear()


def not_captured(reason: str) -> str:
    """One line."""
    return f"note: training steps are not captured as a CUDA graph: {reason}"


class CapturedSteps(pl.Callback):
    """Captures the steps of an :class:`NVAELightning` where that is possible.

    Where it is not, one line on stderr says why, and training goes on as without this callback.

    Args:
        graphs: makes what captures, of a device; a test's.

    Attributes:
        step: in training, where steps are captured.
        replays: micro-batches that the last training has replayed.
    """

    def __init__(self, graphs: Callable[[torch.device], Graphs] = CudaGraphs) -> None:
        self._graphs = graphs
        self.step: CapturedStep | None = None
        self.replays = 0
        self._trained: list[bool] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Model and optimizer are on their device and have their state."""
        reason = self._why_not(trainer, pl_module)
        if reason is not None:
            if trainer.is_global_zero:
                print(not_captured(reason), file=sys.stderr)
            return
        assert isinstance(pl_module, NVAELightning)
        module, optimizer = pl_module, trainer.optimizers[0]

        def clip() -> None:
            module.configure_gradient_clipping(
                optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )

        whole = WholeStep(
            module.model, module.loss, optimizer, guard=guard_of(trainer),
            clip=clip if trainer.gradient_clip_val else None,
            micro_batches=trainer.accumulate_grad_batches,
        )  # fmt: skip
        self.step = CapturedStep(whole, self._graphs(module.model.device))
        module.whole_step = self.step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A callback may have frozen weights, or let others go."""
        if self.step is None:
            return
        reason = _why_optimizer(trainer.optimizers)
        if reason is not None:
            self.step.stop(reason)
        forget(pl_module)  # what a validation has derived, and no training pass will free
        trained = [p.requires_grad for p in pl_module.parameters()]
        if trained != self._trained:
            self._trained = trained
            self.step.forget()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The graphs' memory goes back."""
        self._end(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The same after an error."""
        self._end(pl_module)

    def _end(self, module: pl.LightningModule) -> None:
        if isinstance(module, NVAELightning):
            module.whole_step = None
        if self.step is not None:
            self.replays = self.step.replays
        self.step = None

    def _why_not(self, trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
        """Why steps cannot be captured, or None."""
        if not isinstance(module, NVAELightning):
            return f"{type(module).__name__} is no NVAELightning"
        if self._graphs is CudaGraphs and module.device.type != "cuda":
            return f"the device is {module.device.type}"
        if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
            return "several processes, or a strategy of their own"
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return "float16 has a loss scaler, which asks the host"
        if torch.is_anomaly_enabled():
            return "trainer.detect_anomaly looks at every operation"
        if not isinstance(trainer.profiler, PassThroughProfiler):  # type: ignore[attr-defined]
            return "trainer.profiler looks at every part of a step"
        return (
            _why_optimizer(trainer.optimizers) or _why_callbacks(trainer) or _why_overridden(module)
        )


def _why_optimizer(optimizers: list[Optimizer]) -> str | None:
    optimizer = optimizers[0]
    if len(optimizers) > 1 or len(optimizer.param_groups) > 1:
        return "there are several optimizers or parameter groups"
    if not reads_device(optimizer):
        kind = type(optimizer).__name__.removeprefix("HostSwitched")
        return f"the host decides in {kind} whether a step is taken; adamax and adamw can be"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks"
    return None


def _why_callbacks(trainer: pl.Trainer) -> str | None:
    """A callback of the user's may read or change gradients where a graph has no hook."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in GRADIENT_HOOKS:
            method = getattr(type(callback), hook)
            known = method is getattr(pl.Callback, hook) or method.__module__.startswith("nvae.")
            if not known:
                return f"the callback {type(callback).__name__} has {hook}"
    return None


def _why_overridden(module: NVAELightning) -> str | None:
    for hook in STEP_HOOKS:
        if getattr(type(module), hook) is not getattr(NVAELightning, hook):
            return f"{type(module).__name__} has its own {hook}"
    kind = type(module.loss)
    if kind.forward is not Objective.forward:
        return f"{kind.__name__} has its own forward"
    if not vars(kind).get("capturable"):  # what a graph holds must not change unseen
        return f"the objective {kind.__name__} does not say `capturable = True`"
    return None
