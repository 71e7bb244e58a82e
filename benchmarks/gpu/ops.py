"""The depthwise ops and their chain against PyTorch's own on the presets' shapes, in bfloat16.

Every figure is a median over replays of a CUDA graph that walks through rings of inputs and of
outputs, both several times as large as any L2 cache, so that each byte comes from the device's
memory and goes there. The copy bandwidth is measured in the same process, and an op is given as a
share of it: the bytes of the passes that no implementation can avoid, over its time, over that
bandwidth.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.running import Bar, Case, Cases, Emit, Part, Setting
from nvae.command_line import brief
from nvae.ops import Impl, bn_swish, bn_swish_depthwise, depthwise_conv2d

SHAPES = {
    "32x1536x16x16": "cifar10",
    "16x768x32x32": "celeba64",
    "16x3072x8x8": "celeba64",
    "4x360x128x128": "ffhq256",
    "4x5760x8x8": "ffhq256",
    "4x90x256x256": "ffhq256",
    "200x1536x4x4": "mnist",
}
JUDGED = "32x1536x16x16"
K = 5
DTYPE = torch.bfloat16
RING_BYTES = 512 * 2**20
COPIED_BYTES = 512 * 2**20
REPEATS = 50
WARM_SECONDS = 0.1  # of replays, until the clocks are up
OURS = "nvae"
DEPTHWISE = ("forward", "data gradient", "weight gradient")
PASSES = {
    "forward": 2,
    "data gradient": 2,
    "weight gradient": 2,
    "both gradients": 3,
    "chain forward": 5,  # sums of x: 1; fused: 2; apply: 2
    "chain backward": 9,  # inner apply: 3; depthwise: 3; outer apply: 3
    "bn_swish forward": 3,
}
"""Tensors read and written, each once, that an op cannot do without."""

Step = Callable[[int], Any]
Clock = Callable[[Step, int], dict[str, float]]
"""Milliseconds of ``step(i)`` on buffer i of a ring: median, fastest and slowest."""


def graph_clock(step: Step, ring: int) -> dict[str, float]:
    """Time a step by CUDA events around replays of a graph; outputs are ringed as inputs are."""
    torch.cuda.empty_cache()  # of the graph before this one
    kept: list[Any] = [None] * ring

    def walk(calls: int) -> None:
        for i in range(calls):
            kept[i % ring] = step(i % ring)  # the one that was kept goes when the next is there

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        walk(min(3, ring))
    torch.cuda.current_stream().wait_stream(stream)
    kept[:] = [None] * ring
    calls = 2 * ring
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk(calls)
    until = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return _spread(times)


def host_clock(step: Step, ring: int) -> dict[str, float]:
    """The same by the host's clock, for a dry run."""
    times = []
    for i in range(3):
        begin = time.perf_counter()
        step(i % ring)
        times.append(1e3 * (time.perf_counter() - begin))
    return _spread(times)


def _spread(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def copy_bandwidth(clock: Clock, device: str, size: int) -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / (clock(lambda _: target.copy_(source), 1)["ms"] / 1e3)


def eager_chain(x: Tensor, g1: Tensor, b1: Tensor, w: Tensor, g2: Tensor, b2: Tensor) -> Tensor:
    """BN + Swish -> depthwise -> BN + Swish as PyTorch users write it."""
    y = F.silu(F.batch_norm(x, None, None, g1, b1, True))
    y = F.conv2d(y, w.to(y.dtype), None, 1, K // 2, 1, x.shape[1])
    return F.silu(F.batch_norm(y, None, None, g2, b2, True))


class Shape:
    """All ops on tensors of one shape.

    Args:
        shape: ``(B, C, H, W)``.
        device: ``cuda``, or ``cpu`` in a dry run, where the kernels' formulas stand for them.
        emit: is given each op when it is done.
        ring_bytes: of all inputs of one kind together.
    """

    def __init__(self, shape: tuple[int, ...], device: str, emit: Emit, ring_bytes: int) -> None:
        self.shape, self.device, self.emit = shape, device, emit
        self.on_gpu = device == "cuda"
        self.clock: Clock = graph_clock if self.on_gpu else host_clock
        self.impl: Impl = "cuda" if self.on_gpu else "auto"
        b, c, h, w = shape
        self.pass_bytes = b * c * h * w * DTYPE.itemsize
        self.ring = max(4, min(32, -(-ring_bytes // self.pass_bytes)))
        self.bandwidth = copy_bandwidth(
            self.clock, device, COPIED_BYTES if self.on_gpu else self.pass_bytes
        )
        emit(f"copy {self.bandwidth / 1e12:.2f} TB/s", copy_bytes_per_second=self.bandwidth)
        nhwc, nchw = torch.channels_last, torch.contiguous_format
        self.x = {layout: self._images(layout) for layout in (nhwc, nchw)}
        self.dy = {layout: self._images(layout) for layout in (nhwc, nchw)}
        shapes: list[tuple[int, ...]] = [(c,), (c,), (c, 1, K, K), (c,), (c,)]
        self.parameters = [torch.rand(s, device=device).requires_grad_() for s in shapes]
        self.weight = self.parameters[2].detach()
        self.narrow = self.weight.to(DTYPE)

    def _images(self, layout: torch.memory_format) -> list[Tensor]:
        made = (torch.randn(self.shape, device=self.device) for _ in range(self.ring))
        return [t.to(DTYPE).contiguous(memory_format=layout) for t in made]

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By inductor, for this shape."""
        backend = "inductor" if self.on_gpu else "eager"
        return torch.compile(function, dynamic=False, backend=backend)

    def times(self, steps: dict[str, Step]) -> dict[str, Any]:
        """Times of each implementation; of one that fails, the reason."""
        found: dict[str, Any] = {}
        for name, step in steps.items():
            try:
                found[name] = self.clock(step, self.ring)
            except Exception as error:
                found[name] = {"error": brief(f"{type(error).__name__}: {error}", 300)}
        return found

    def emit_op(self, op: str, found: dict[str, Any]) -> None:
        """Emit an op's times with what follows from them."""
        ours = found[OURS].get("ms")
        others = {name: each["ms"] for name, each in found.items() if name != OURS and "ms" in each}
        entry: dict[str, Any] = {"times": found}
        if ours and others:
            best = min(others, key=lambda name: others[name])
            entry |= {"best_other": best, "speedup": others[best] / ours}
        if ours and op in PASSES:
            ideal = PASSES[op] * self.pass_bytes / self.bandwidth * 1e3
            entry["share_of_copy"] = ideal / ours
        shown = ", ".join(
            f"{name} {each['ms']:.4f} ms" if "ms" in each else f"{name} failed"
            for name, each in found.items()
        )
        share = f", {entry['share_of_copy']:.0%} of copy" if "share_of_copy" in entry else ""
        self.emit(f"{op}: {shown}{share}", **{op: entry})

    def depthwise(self) -> None:
        """The plain convolution: forward and gradients."""
        nhwc, nchw = torch.channels_last, torch.contiguous_format
        channels = self.shape[1]

        def conv(x: Tensor) -> Tensor:
            return F.conv2d(x, self.narrow, None, 1, K // 2, 1, channels)

        def native(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                with torch.backends.cudnn.flags(enabled=False):
                    return call(*arguments)

            return run

        def on(call: Callable[[Tensor], Any], layout: torch.memory_format) -> Step:
            return lambda i: call(self.x[layout][i])

        with torch.no_grad():
            self.emit_op(
                "forward",
                self.times(
                    {
                        OURS: on(lambda x: depthwise_conv2d(x, self.weight, impl=self.impl), nhwc),
                        "cuDNN channels_last": on(conv, nhwc),
                        "contiguous": on(conv, nchw),
                        "native contiguous": on(native(conv), nchw),
                        "inductor": on(self.compiled(conv), nhwc),
                    }
                ),
            )
            for op, mask in (
                ("data gradient", (True, False)),
                ("weight gradient", (False, True)),
                ("both gradients", (True, True)),
            ):
                self._gradient(op, mask, native)

    def _gradient(self, op: str, mask: tuple[bool, bool], native: Callable[..., Any]) -> None:
        nhwc, nchw = torch.channels_last, torch.contiguous_format
        channels = self.shape[1]

        def theirs(x: Tensor, dy: Tensor) -> Any:
            return torch.ops.aten.convolution_backward(
                dy, x, self.narrow, None, [1, 1], [K // 2] * 2, [1, 1], False, [0, 0], channels,
                [*mask, False],
            )  # fmt: skip

        def ours(x: Tensor, dy: Tensor) -> Any:
            return torch.ops.nvae.depthwise_backward(dy, x, self.weight, 1, *mask)

        def on(call: Callable[[Tensor, Tensor], Any], layout: torch.memory_format) -> Step:
            return lambda i: call(self.x[layout][i], self.dy[layout][i])

        self.emit_op(
            op,
            self.times(
                {
                    OURS: on(ours, nhwc),
                    "cuDNN channels_last": on(theirs, nhwc),
                    "contiguous": on(theirs, nchw),
                    "native contiguous": on(native(theirs), nchw),
                    "inductor": on(self.compiled(theirs), nhwc),
                }
            ),
        )

    def chain(self) -> None:
        """BN + Swish -> depthwise -> BN + Swish: forward, both passes, and their difference."""
        nhwc, nchw = torch.channels_last, torch.contiguous_format

        def fused(x: Tensor, g1: Tensor, b1: Tensor, w: Tensor, g2: Tensor, b2: Tensor) -> Tensor:
            h = bn_swish_depthwise(x, g1, b1, w, impl=self.impl)
            return bn_swish(h.output, g2, b2, moments=h.moments, impl=self.impl)

        chains: dict[str, tuple[Callable[..., Tensor], torch.memory_format]] = {
            OURS: (fused, nhwc),
            "channels_last": (eager_chain, nhwc),
            "contiguous": (eager_chain, nchw),
            "inductor channels_last": (self.compiled(eager_chain), nhwc),
            "inductor contiguous": (self.compiled(eager_chain), nchw),
        }
        steps = {name: self._steps(*each) for name, each in chains.items()}
        forward = self.times({name: first for name, (first, _) in steps.items()})
        self.emit_op("chain forward", forward)
        both = self.times({name: second for name, (_, second) in steps.items()})
        self.emit_op("chain both", both)
        self.emit_op("chain backward", backward_of(forward, both))

    def _steps(
        self, chain: Callable[..., Tensor], layout: torch.memory_format
    ) -> tuple[Step, Step]:
        leaves = [t.detach().requires_grad_() for t in self.x[layout]]

        def forward(i: int) -> Tensor:
            return chain(leaves[i], *self.parameters)

        def both(i: int) -> Any:
            inputs = [leaves[i], *self.parameters]
            return torch.autograd.grad(forward(i), inputs, self.dy[layout][i])

        return forward, both

    def activation(self) -> None:
        """Statistics, normalization and Swish alone."""

        def of(impl: Impl) -> Step:
            x, (gamma, beta) = self.x[torch.channels_last], self.parameters[:2]
            return lambda i: bn_swish(x[i], gamma, beta, impl=impl)

        with torch.no_grad():
            steps = {OURS: of(self.impl), "channels_last": of("reference")}
            self.emit_op("bn_swish forward", self.times(steps))


def backward_of(forward: dict[str, Any], both: dict[str, Any]) -> dict[str, Any]:
    """Times of the backward pass: those of both passes less those of the first."""
    found: dict[str, Any] = {}
    for name in forward:
        failed = [each[name] for each in (forward, both) if "error" in each[name]]
        found[name] = failed[0] if failed else {"ms": both[name]["ms"] - forward[name]["ms"]}
    return found


def measure_shape(emit: Emit, shape: tuple[int, ...], dry: bool) -> None:
    """The case of one shape."""
    if not dry:
        torch.backends.cudnn.benchmark = True
    ops = Shape(shape, "cpu" if dry else "cuda", emit, 1 if dry else RING_BYTES)
    ops.depthwise()
    ops.chain()
    ops.activation()


def cases(setting: Setting) -> list[Case]:
    """One a shape, the judged one first."""
    if setting.dry:
        return [Case("2x8x4x4", measure_shape, {"shape": (2, 8, 4, 4), "dry": True})]
    return [
        Case(name, measure_shape, {"shape": tuple(map(int, name.split("x"))), "dry": False})
        for name in SHAPES
    ]


def figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
    """A row an op and shape."""
    bandwidths = [
        v["copy_bytes_per_second"] for v in cases.values() if "copy_bytes_per_second" in v
    ]
    if bandwidths:
        low, high = min(bandwidths) / 1e12, max(bandwidths) / 1e12
        yield "copy of 512 MiB", f"{low:.2f} to {high:.2f} TB/s, read and written", ""
    for shape, values in cases.items():
        used = f" ({SHAPES[shape]})" if shape in SHAPES else ""
        for op in PASSES:
            entry = values.get(op)
            if entry is None:
                continue
            ours = entry["times"][OURS]
            if "ms" not in ours:
                yield f"{op}, {shape}{used}", "failed", ours["error"].replace("|", "/")
                continue
            spread = (
                f" ({ours['fastest']:.4f} to {ours['slowest']:.4f})" if "fastest" in ours else ""
            )
            share = f", {entry['share_of_copy']:.0%} of copy" if "share_of_copy" in entry else ""
            beside = ""
            if "speedup" in entry:
                best = entry["best_other"]
                ms = entry["times"][best]["ms"]
                beside = f"{entry['speedup']:.2f}x the best other: {best}, {ms:.4f} ms"
            yield f"{op}, {shape}{used}", f"{ours['ms']:.4f} ms{spread}{share}", beside


def _judged(op: str, value: str, factor: float = 1.0) -> Callable[[Cases], float | None]:
    def measured(cases: Cases) -> float | None:
        found = cases.get(JUDGED, {}).get(op, {}).get(value)
        return None if found is None else factor * found

    return measured


BARS = (
    *(
        Bar(f"depthwise {op}, {JUDGED} bf16, over the best other", 2.0, "x", _judged(op, "speedup"))
        for op in DEPTHWISE
    ),
    Bar(f"chain forward, {JUDGED} bf16, of copy", 55, "%",
        _judged("chain forward", "share_of_copy", 100)),
    Bar(f"chain backward, {JUDGED} bf16, of copy", 50, "%",
        _judged("chain backward", "share_of_copy", 100)),
)  # fmt: skip
PART = Part("ops", cases, figures, BARS)
