"""What a graph of a step would hold: no number of the step, nothing of the host."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.launches import kernels_in_place
from nvae.models import MODELS, ModelConfig
from nvae.models.layers import DataInitConv2d
from nvae.objective import ObjectiveConfig, build_objective
from nvae.ops import multi_tensor
from nvae.ops.adamax import _is_taken
from nvae.ops.multi_tensor import block_table, tables_of_capture
from nvae.training import captured
from nvae.training.captured import CudaGraphs
from nvae.training.guard import BadSteps
from nvae.training.optimizers import OptimizerConfig, build_optimizer
from nvae.training.whole_step import StepInput, StepPosition, WholeStep
from tests.training.runs import RECIPES
from tests.training.tape import FORBIDDEN, READS, Tape, tensors_of

BATCH = 4
TINY = ModelConfig(
    image_size=8, image_channels=3, bits=4, likelihood="logistic_mixture", num_mixtures=2,
    num_scales=2, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1, postprocess_cells=1,
    encoder_channels=4, decoder_channels=4, latent_channels=2, encoder_cells_per_group=1,
    decoder_cells_per_group=1, num_flows=1,
)  # fmt: skip
EARLY = StepPosition(position=3, total_steps=100, step=4, batch=7)
LATE = StepPosition(position=80, total_steps=100, step=81, batch=161, weight=0.5)


def problem(
    device: str, micro_batches: int = 1, family: str = "nvae"
) -> tuple[WholeStep, StepInput]:
    """A step with everything in it, and a batch; what reads the device at first has read it."""
    torch.manual_seed(0)
    recipe = RECIPES[family]
    config = replace(recipe["model"], image_channels=3) if recipe else TINY
    settings = recipe.get("objective") or ObjectiveConfig(
        free_bits=0.1, encoder_noise=0.05, spectral_weight_initial=1.0
    )
    model = MODELS[family](config).to(device, memory_format=torch.channels_last)
    objective = build_objective(model, settings).to(device)
    for module in model.modules():
        if isinstance(module, DataInitConv2d):
            module.checked = True
    if objective.spectral_norm is not None:
        objective.spectral_norm.is_warm = True
    guard = BadSteps(skip_threshold=1e6)
    guard.begin(model, micro_batches=micro_batches)
    parameters = list(model.parameters())

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    step = WholeStep(
        model, objective, build_optimizer(OptimizerConfig(), parameters),
        guard=guard, clip=clip, micro_batches=micro_batches,
    )  # fmt: skip
    noise = [torch.randn(s, device=device) for s in model.noise_shapes(BATCH)]
    x = torch.rand(BATCH, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    index = torch.arange(BATCH, device=device)
    return step, StepInput(x, noise, index, torch.randn_like(x))


def schedule_of(step: WholeStep, at: StepPosition, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(step.schedule(at), dtype=torch.float64, device=device)


class OnDevice(TorchDispatchMode):
    """Forbids what a capturing stream forbids, on a device that has no numbers to look at.

    Attributes:
        traced: every operation, with the numbers and flags that it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traced: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler":
            return func(*args, **(kwargs or {}))
        if func in READS:
            raise RuntimeError(f"{func} reads the device: {FORBIDDEN}")
        out = func(*args, **(kwargs or {}))
        for t in [*tensors_of((args, kwargs)), *tensors_of(out)]:
            # such as one made from a list: copied to a GPU, and waited for
            if not t.is_meta:
                raise RuntimeError(f"{func} has a tensor on the host: {FORBIDDEN}")
        leaves = tree_leaves((args, kwargs))
        self.traced.append(f"{func} {[v for v in leaves if not isinstance(v, torch.Tensor)]}")
        return out


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which knows nothing of the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


@pytest.mark.parametrize(
    "case",
    [
        "kernels",
        *(pytest.param(f, marks=[pytest.mark.exhaustive] * (f == "vdvae")) for f in RECIPES),
    ],
)
def test_a_step_has_no_number_of_its_own(no_autocast: None, case: str) -> None:
    """Guard, clipping and two micro-batches included: beta, lambda, weight, learning rate and
    counts differ between the two, the operations and all of their numbers do not; nothing is read
    from the device, nothing is copied to it."""
    traces = []
    with kernels_in_place() if case == "kernels" else nullcontext():
        step, batch = problem("meta", 2, "nvae" if case == "kernels" else case)
        for at, rate in ((EARLY, 1e-2), (EARLY, 1e-2), (LATE, 3e-3)):
            step.optimizer.param_groups[0]["lr"] = rate
            schedule = schedule_of(step, at, "meta")
            mode = OnDevice() if traces else nullcontext()  # the first makes what is made once
            with mode:
                step(batch, schedule, replace(at, is_last=False, regularize=False))
                step(batch, schedule, replace(at, is_first=False))
            traces.append(mode.traced if isinstance(mode, OnDevice) else [])
    assert len(traces[1]) > 1000
    assert traces[1] == traces[2]
    # Adamax's kernel takes them all: one gradient of another layout would be the formula's turn
    assert all(p.grad is None or _is_taken(p, p.grad) for p in step.model.parameters())


def test_the_tracing_would_see(no_autocast: None) -> None:
    """It can fail: by the step's beta as a number, by item(), by a copy from the host."""
    step, batch = problem("meta")
    traces = []
    for at in (EARLY, LATE):
        with OnDevice() as mode:
            step.objective(
                step.model, batch.x, batch.noise, step=at.position, total_steps=at.total_steps,
                input_noise=batch.input_noise,
            )  # fmt: skip
        traces.append(mode.traced)
    assert traces[0] != traces[1]
    with pytest.raises(RuntimeError, match=FORBIDDEN), OnDevice():
        batch.x.sum().item()
    with pytest.raises(RuntimeError, match=FORBIDDEN), OnDevice():
        torch.tensor(1.0).to("meta")


def test_a_tape_is_like_a_graph() -> None:
    """Capturing computes nothing, replaying knows the memory alone, reading is refused."""
    x, total, number = torch.ones(3), torch.zeros(3), 2.0
    with Tape() as tape:
        doubled = x * number
        total += doubled
    tape.undo()
    assert total.eq(0).all()
    assert doubled.isnan().all()
    x.fill_(5.0)
    number = 7.0
    tape.replay()
    tape.replay()
    assert total.eq(20).all()
    with pytest.raises(RuntimeError, match=FORBIDDEN), Tape():
        float(x[0])


class _Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: "_Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_the_driver_is_called_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and capture are on one side stream; threads may pin memory during a capture."""
    log: list[str] = []

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def stream(which: _Stream) -> Iterator[None]:
        log.append(f"on {which.name}")
        try:
            yield
        finally:
            log.append(f"off {which.name}")

    @contextmanager
    def graph(made: Graph, pool: Any, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        log.append(f"capture on {stream.name}, {capture_error_mode}, pool {pool}")
        yield
        log.append("captured")

    here = _Stream(log, "main")
    cuda = captured.torch.cuda
    monkeypatch.setattr(cuda, "Stream", lambda device: _Stream(log, "side"))
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: 1)
    monkeypatch.setattr(cuda, "current_stream", lambda: here)
    monkeypatch.setattr(cuda, "stream", stream)
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph", graph)
    graphs: Any = CudaGraphs(torch.device("cpu"))
    assert graphs.run(lambda: log.append("step") or "loss") == "loss"
    result, replay = graphs.capture(lambda: log.append("step") or "loss")
    assert result == "loss"
    replay()
    assert log == [
        "side waits for main", "on side", "step", "off side", "main waits for side",
        "on main", "capture on side, thread_local, pool 1", "step", "captured", "off main",
        "replay",
    ]  # fmt: skip
    log.clear()
    with pytest.raises(ZeroDivisionError):
        graphs.capture(lambda: 1 / 0)
    assert log[-1] == "off main"  # torch.cuda.graph leaves another stream then


def test_a_capture_fills_its_tables_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the device is not allowed in a capture; addresses are known in it alone. Where they
    lie was made before: memory of the graph's own is written by its earlier kernels, too."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tables_of_capture(torch.device("cpu")) as tables:
        tables.memory.fill_(-1)
        with monkeypatch.context() as inside:
            for name in ("empty", "empty_like", "zeros"):
                inside.setattr(torch, name, None)
            table, blocks = block_table(torch.device("cuda"), ((11, 12), (21, 22)), (5, 2), 4)
            more, _ = block_table(torch.device("cuda"), ((31, 32, 33),), (1,), 4)
        assert tables.memory.eq(-1).all()
    assert table.tolist() == [[11, 12], [21, 22]]
    assert blocks.tolist() == [[0, 0], [0, 4], [1, 0]]
    assert more.tolist() == [[31, 32, 33]]
    place = tables.memory.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == place for t in (table, blocks, more))


def test_a_capture_without_room_for_tables_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never a table that nobody fills."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(multi_tensor, "MOST_IN_TABLES", 10)
    with (
        pytest.raises(RuntimeError, match="no room for so many tensors"),
        tables_of_capture(torch.device("cpu")),
    ):
        block_table(torch.device("cuda"), ((11, 12),), (5,), 1)
    with pytest.raises(RuntimeError, match="no tables_of_capture around it"):
        block_table(torch.device("cuda"), ((11, 12),), (5,), 1)
