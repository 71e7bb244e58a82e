"""Time of drawing images from the prior, by each way through the network.

    python -m benchmarks.sample experiment=mnist --batch 16
    python -m benchmarks.sample experiment=mnist --batch 1 --compile
    python -m benchmarks.sample experiment=celeba64 --batch 64 --device cuda --precision bf16

The ways are timed in turn, round after round, and compared within each round. Any override of
train.py goes before the options. The weights are random; time does not depend on them.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import PRECISIONS, Timing, composed, measure, parser, set_up
from nvae.models import HierarchicalVAE
from nvae.sampling import CompiledDecoder
from nvae.sampling.compiled import PriorDecoder, for_inductor

TEMPERATURE = 0.7
UNFOLDED = "eager, nothing folded"
Draw = Callable[[], Tensor]


def main() -> None:
    """Print the time of one batch by each way, and the ratios to the first."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--compile", action="store_true",
        help="also compiled, as sample.py compile=true does it",
    )  # fmt: skip
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    if options.compile and options.device == "cpu" and options.precision != "32":
        arguments.error("--compile on the CPU makes float32 code; leave --precision out")
    set_up(options)
    config = composed(options.overrides)
    torch.manual_seed(0)
    model = config.build_model().to(options.device).eval()
    print(
        f"{' '.join(options.overrides)}: batch {options.batch}, {options.device}, precision "
        f"{options.precision}, {options.threads} threads, torch {torch.__version__}"
    )
    ways = ways_to_sample(model, options.batch, compiled=options.compile)
    for name in ways:
        check_way(ways, name, options.device)
    dtype = PRECISIONS[options.precision]
    with torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext():
        rounds = [_measured(ways, options) for _ in range(options.rounds)]
    for name in ways:
        timings = [each[name] for each in rounds]
        ratios = sorted(each[UNFOLDED].median / each[name].median for each in rounds)
        print(
            f"{_together(timings).row(name, options.batch)}  "
            f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    peak = max(timing.peak_memory for each in rounds for timing in each.values())
    print(f"peak memory of all: {peak:,.0f} MiB")


def _measured(ways: dict[str, Draw], options: argparse.Namespace) -> dict[str, Timing]:
    return {
        name: measure(draw, options.device, options.warmup, options.runs)
        for name, draw in ways.items()
    }


def ways_to_sample(model: HierarchicalVAE, batch: int, *, compiled: bool) -> dict[str, Draw]:
    """Draws of one batch from the prior, by name; what `torch.compile` makes, it makes when called.

    Args:
        model: in evaluation, on its device; it becomes channels_last.
        batch: images.
        compiled: also compiled; on a GPU without a CUDA graph and with one.
    """
    noise = model.draw_noise(batch)
    plain = type(model)(model.config).to(model.device).eval()
    plain.load_state_dict(model.state_dict())
    model = model.to(memory_format=torch.channels_last)

    def eager(network: HierarchicalVAE) -> Tensor:
        return network.likelihood(network.sample_logits(batch, TEMPERATURE, noise)).mean

    def unfolded() -> Tensor:
        # the network as it trains: weights normalized and batch normalizations done every time
        with mock.patch("nvae.models.folding.Derived.usable", return_value=False):
            return eager(plain)

    def drawn(decode: Callable[..., Tensor], temperature: float | Tensor) -> Draw:
        def draw() -> Tensor:
            with torch.inference_mode():
                return model.likelihood(decode(noise, temperature)).mean

        return draw

    ways: dict[str, Draw] = {UNFOLDED: unfolded, "eager, folded": lambda: eager(model)}
    if compiled and model.device.type == "cuda":
        temperatures = torch.full((len(noise),), TEMPERATURE, device=model.device)
        decoder = torch.compile(for_inductor(PriorDecoder(model)), fullgraph=True)
        ways["compiled, no CUDA graph"] = drawn(decoder, temperatures)
        ways["compiled, CUDA graph"] = drawn(CompiledDecoder(model, batch), TEMPERATURE)
    elif compiled:
        ways["compiled"] = drawn(CompiledDecoder(model, batch), TEMPERATURE)
    return ways


def check_way(ways: dict[str, Draw], name: str, device: str) -> None:
    """Raise an AssertionError where a way draws other images than the unfolded network."""
    tolerance = 1e-5 if device == "cpu" else 1e-2  # TF32 is on in GPU convolutions
    torch.testing.assert_close(
        ways[name](), ways[UNFOLDED](), rtol=0, atol=tolerance,
        msg=lambda found: f"{name}: {found}",
    )  # fmt: skip


def _together(timings: Sequence[Timing]) -> Timing:
    return Timing(
        statistics.median(t.median for t in timings),
        min(t.fastest for t in timings),
        max(t.slowest for t in timings),
        max(t.peak_memory for t in timings),
    )


if __name__ == "__main__":
    main()
