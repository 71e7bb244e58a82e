"""Time the ops against PyTorch's own on this GPU: one command, one JSON.

    python benchmarks/ops.py [--shapes cifar10 celeba64 ...] [--quick] [--no-step] [--out FILE]

Every figure is the median over repeats of a CUDA graph that walks through a ring of buffers
larger than the L2 cache, so that no input is still cached from the last call. The copy bandwidth is
measured in the same run, and every op is given as a share of it: the bytes of the ideal passes,
over its time, over the copy bandwidth. Time and peak memory of a training step of the cifar10
preset are measured with the kernels and without them, compiled cell by cell.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.ops import Impl, bn_swish, bn_swish_depthwise, depthwise_conv2d

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "cifar10": (32, 1536, 16, 16),
    "celeba64-32": (16, 768, 32, 32),
    "celeba64-8": (16, 3072, 8, 8),
    "ffhq256-128": (4, 360, 128, 128),
    "ffhq256-8": (4, 5760, 8, 8),
    "ffhq256-256": (4, 90, 256, 256),
    "mnist": (200, 1536, 4, 4),
}
K = 5
DTYPE = torch.bfloat16
DEVICE = "cuda"
RING_BYTES = 256 * 2**20  # several times any L2 cache
# tensor passes that no implementation can avoid (field notes; docs/kernels.md)
PASSES = {
    "forward": 2,
    "data gradient": 2,
    "weight gradient": 2,
    "both gradients": 3,
    "chain forward": 5,  # sums of x; fused; apply
    "chain backward": 9,
    "bn_swish forward": 3,
    "bn_swish backward": 5,
}

Step = Callable[[int], Any]


def median_ms(step: Step, ring: int, repeats: int, calls: int) -> float:
    """Median milliseconds of one call; ``step(i)`` works on buffer i of the ring."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(3, ring)):
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            step(i % ring)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second, read plus written, of a large device copy."""
    n = 512 * 2**20
    source, target = (torch.empty(n, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    ms = median_ms(lambda _: target.copy_(source), 1, repeats, 4)
    return 2 * n / (ms / 1e3)


def eager_chain(x: Tensor, g1: Tensor, b1: Tensor, w: Tensor, g2: Tensor, b2: Tensor) -> Tensor:
    """BN + Swish -> depthwise -> BN + Swish as PyTorch users write it."""
    y = F.silu(F.batch_norm(x, None, None, g1, b1, True))
    y = F.conv2d(y, w.to(y.dtype), None, 1, K // 2, 1, x.shape[1])
    return F.silu(F.batch_norm(y, None, None, g2, b2, True))


def fused_chain(x: Tensor, g1: Tensor, b1: Tensor, w: Tensor, g2: Tensor, b2: Tensor) -> Tensor:
    """The same with the kernels."""
    h = bn_swish_depthwise(x, g1, b1, w, impl="cuda")
    return bn_swish(h.output, g2, b2, sums=h.sums, impl="cuda").output


def bench_shape(shape: tuple[int, ...], repeats: int, bandwidth: float) -> dict[str, Any]:
    """All ops on one shape: milliseconds by op and implementation."""
    b, c, h, w = shape
    pass_bytes = b * c * h * w * DTYPE.itemsize
    ring = max(2, min(16, -(-RING_BYTES // (3 * pass_bytes))))
    calls = 2 * ring

    def images(memory_format: torch.memory_format) -> list[Tensor]:
        made = (torch.randn(shape, device=DEVICE) for _ in range(ring))
        return [t.to(DTYPE).contiguous(memory_format=memory_format) for t in made]

    def parameters() -> list[Tensor]:
        shapes: list[tuple[int, ...]] = [(c,), (c,), (c, 1, K, K), (c,), (c,)]
        return [torch.rand(s, device=DEVICE).requires_grad_() for s in shapes]

    nhwc, nchw = images(torch.channels_last), images(torch.contiguous_format)
    grads, grads_nchw = images(torch.channels_last), images(torch.contiguous_format)
    params = parameters()
    weight = params[2]
    narrow = weight.detach().to(DTYPE)
    result: dict[str, Any] = {}

    def record(op: str, implementation: str, step: Step) -> None:
        times = result.setdefault(op, {})
        try:
            times[implementation] = median_ms(step, ring, repeats, calls)
        except (RuntimeError, torch.AcceleratorError) as error:
            times[implementation] = None
            print(f"    {op} {implementation}: {str(error).splitlines()[0]}", file=sys.stderr)

    def theirs(x: Tensor, dy: Tensor, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, narrow, None, [1, 1], [K // 2] * 2, [1, 1], False, [0, 0], c, mask
        )

    def ours(x: Tensor, dy: Tensor, mask: list[bool]) -> Any:
        return torch.ops.nvae.depthwise_backward(dy, x, weight, 1, mask[0], mask[1])

    def gradient(
        function: Callable[..., Any], xs: list[Tensor], dys: list[Tensor], mask: list[bool]
    ) -> Step:
        return lambda i: function(xs[i], dys[i], mask)

    def conv(x: Tensor) -> Tensor:
        return F.conv2d(x, narrow, None, 1, K // 2, 1, c)

    compiled_conv = torch.compile(conv, dynamic=False)
    with torch.no_grad():
        record("forward", "nvae", lambda i: depthwise_conv2d(nhwc[i], weight, impl="cuda"))
        record("forward", "cudnn channels_last", lambda i: conv(nhwc[i]))
        record("forward", "native contiguous", lambda i: conv(nchw[i]))
        record("forward", "compiled channels_last", lambda i: compiled_conv(nhwc[i]))
        for op, mask in (
            ("data gradient", [True, False, False]),
            ("weight gradient", [False, True, False]),
            ("both gradients", [True, True, False]),
        ):
            record(op, "nvae", gradient(ours, nhwc, grads, mask))
            record(op, "cudnn channels_last", gradient(theirs, nhwc, grads, mask))
            record(op, "native contiguous", gradient(theirs, nchw, grads_nchw, mask))

    chains: dict[str, tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]] = {
        "nvae": (fused_chain, nhwc, grads),
        "eager channels_last": (eager_chain, nhwc, grads),
        "eager contiguous": (eager_chain, nchw, grads_nchw),
        "compiled channels_last": (torch.compile(eager_chain, dynamic=False), nhwc, grads),
        "compiled contiguous": (torch.compile(eager_chain, dynamic=False), nchw, grads_nchw),
    }
    for name, (chain, inputs, outer) in chains.items():
        leaves = [t.detach().requires_grad_() for t in inputs]

        def forward(i: int, chain: Any = chain, leaves: list[Tensor] = leaves) -> Tensor:
            y: Tensor = chain(leaves[i], *params)
            return y

        def both(
            i: int, chain: Any = chain, leaves: list[Tensor] = leaves, outer: list[Tensor] = outer
        ) -> Any:
            y = chain(leaves[i], *params)
            return torch.autograd.grad(y, [leaves[i], *params], outer[i])

        record("chain forward", name, forward)
        record("chain forward + backward", name, both)
        forward_ms, both_ms = (
            result["chain forward"][name], result["chain forward + backward"][name],
        )  # fmt: skip
        known = forward_ms is not None and both_ms is not None
        result.setdefault("chain backward", {})[name] = both_ms - forward_ms if known else None

    def standalone(impl: Impl) -> Step:
        return lambda i: bn_swish(nhwc[i], params[0], params[1], impl=impl).output

    with torch.no_grad():
        record("bn_swish forward", "nvae", standalone("cuda"))
        record("bn_swish forward", "eager channels_last", standalone("reference"))

    report: dict[str, Any] = {}
    for op, times in result.items():
        others = [t for name, t in times.items() if name != "nvae" and t]
        entry: dict[str, Any] = {"ms": times}
        if times["nvae"]:
            entry["speedup over the best other"] = min(others) / times["nvae"] if others else None
            if op in PASSES:
                ideal = PASSES[op] * pass_bytes / bandwidth * 1e3
                entry["share of copy bandwidth"] = ideal / times["nvae"]
        report[op] = entry
    return report


@contextmanager
def kernels_off() -> Iterator[None]:
    """Make ``auto`` take the reference everywhere."""
    with patch("nvae.ops.library.use_kernel", lambda *_: False):
        yield


def bench_step(repeats: int, batch: int) -> dict[str, Any]:
    """Forward, backward and update of the cifar10 preset; cells compiled one by one."""
    from nvae.models import NVAE, ModelConfig
    from nvae.training.recompute import compile_blocks

    def step_time() -> dict[str, float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = ModelConfig(
            image_size=32, image_channels=3, likelihood="logistic_mixture", num_scales=1,
            groups_per_scale=30, adaptive_groups=False, encoder_channels=128, decoder_channels=128,
            num_flows=1, preprocess_blocks=1, preprocess_cells=2, postprocess_cells=2,
        )  # fmt: skip
        model = NVAE(config).to(DEVICE).to(memory_format=torch.channels_last).train()
        compile_blocks(model)
        optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3)
        x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(
            memory_format=torch.channels_last
        )

        def step() -> None:
            with torch.autocast(DEVICE, DTYPE):
                out = model(x)
            log_prob = model.likelihood(out.logits.float()).log_prob(x)
            loss = (out.kl_per_group.sum(1) - log_prob).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for _ in range(5):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        peak = torch.cuda.max_memory_allocated()
        return {"ms": statistics.median(times), "peak_bytes": float(peak)}

    ours = step_time()
    with kernels_off():
        reference = step_time()
    return {
        "batch": batch,
        "nvae": ours,
        "reference compiled": reference,
        "speedup": reference["ms"] / ours["ms"],
        "memory saved": 1 - ours["peak_bytes"] / reference["peak_bytes"],
    }


def environment() -> dict[str, Any]:
    """Versions and device that the figures belong to."""
    properties = torch.cuda.get_device_properties(0)
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda
    versions["cudnn"] = torch.backends.cudnn.version()
    for package in ("triton", "cuda.bindings"):
        try:
            versions[package] = __import__(package, fromlist=["_"]).__version__
        except ImportError:
            versions[package] = None
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "versions": versions,
    }


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def main() -> int:
    """Run, print a summary, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="5 repeats instead of 50")
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--batch", type=int, default=32, help="batch of the training step")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE-DATE.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    repeats = 5 if options.quick else 50
    bandwidth = copy_bandwidth(repeats)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "kernel size": K,
        "repeats": repeats,
        "copy bandwidth, bytes/s": bandwidth,
        "shapes": {},
    }
    print(f"{report['device']}: copy {bandwidth / 1e12:.2f} TB/s")
    for name in options.shapes:
        print(f"{name} {SHAPES[name]}")
        entry = bench_shape(SHAPES[name], repeats, bandwidth)
        report["shapes"][name] = {"shape": SHAPES[name], **entry}
        for op, values in entry.items():
            times = ", ".join(
                f"{which} {ms:.4f}" if ms else f"{which} failed"
                for which, ms in values["ms"].items()
            )
            share = values.get("share of copy bandwidth")
            print(f"  {op}: {times}" + (f" | {share:.0%} of copy" if share else ""))
        torch.cuda.empty_cache()
    if not options.no_step:
        report["training step, cifar10"] = bench_step(max(5, repeats // 5), options.batch)
        print(f"training step: {report['training step, cifar10']}")
    device = report["device"].replace(" ", "-").replace("/", "-")
    out = options.out or RESULTS / f"{device}-{datetime.now(UTC):%Y%m%d}.json"
    write_atomically(out, json.dumps(report, indent=1) + "\n")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
