"""Memory of a training step: the estimate beside a measured peak.

    python -m benchmarks.memory experiment=cifar10
    python -m benchmarks.memory experiment=cifar10 --fit 24 80
    python -m benchmarks.memory experiment=mnist data.batch_size=16 --measure

Overrides are those of train.py. The estimate needs no GPU and runs nothing; it is of one with our
kernels unless `--eager` is given. `--fit` says the largest batch of GPUs with so many GB, of which
an estimate may fill 80 %. `--measure` runs real steps: on a GPU it prints the allocator's peak; on
the CPU the bytes that are held between forward and backward, which is the part that is traced.
"""

import argparse

import torch

from benchmarks.fit import compose_steps, fit_steps
from benchmarks.measure import composed
from nvae.cli.config import TrainConfig, averages_on_device
from nvae.cli.fitting import build_module
from nvae.training.memory import HALF, MemoryEstimate, estimate_memory, kept_bytes
from nvae.training.recompute import USABLE_MEMORY

GIB = 2**30
STEPS = 8
"""Enough for a captured step to be replayed."""

LABELS = ("all kept", "segments recomputed")


def estimates(
    config: TrainConfig, batch_size: int, kernels: bool
) -> tuple[MemoryEstimate, MemoryEstimate]:
    """The estimates of a configuration, without and with recomputation."""
    return estimate_memory(
        config.build_model,
        batch_size,
        precision=config.trainer.precision,
        objective=config.objective,
        average_on_device=averages_on_device(config.callbacks),
        synchronized=config.trainer.world_size > 1,
        kernels=kernels,
    )


def print_estimate(label: str, e: MemoryEstimate) -> None:
    """One line of the table, in GiB."""
    parts = (e.total, e.standing, e.activations, e.regularizers, e.segment)
    print(f"{label:<22}" + "".join(f"{part / GIB:>13.2f}" for part in parts))


def largest_batch(small: MemoryEstimate, large: MemoryEstimate, step: int, usable: float) -> int:
    """Images of the largest batch whose estimate fits.

    Args:
        small: of ``step`` images.
        large: of twice as many; between and beyond, bytes are linear in the images.
        step: images.
        usable: bytes.
    """

    def traced(e: MemoryEstimate) -> int:
        return e.activations + e.segment

    image = (traced(large) - traced(small)) / step
    constant = traced(small) - image * step + small.regularizers
    if small.standing + small.update > usable:
        return 0
    return max(0, int((usable - small.standing - constant) / image))


def print_largest(config: TrainConfig, sizes: list[float], kernels: bool) -> None:
    """The largest batches for GPUs of ``sizes`` GB."""
    step = 64  # large enough that a segment outweighs the copies of the weights
    small, large = (estimates(config, n, kernels) for n in (step, 2 * step))
    for size in sizes:
        fits = [
            largest_batch(a, b, step, USABLE_MEMORY * size * 1e9)
            for a, b in zip(small, large, strict=True)
        ]
        texts = [f"{label} {fit}" for label, fit in zip(LABELS, fits, strict=True)]
        print(f"{size:g} GB, largest batch: {', '.join(texts)}")


def print_held_on_cpu(config: TrainConfig) -> None:
    """What a real pass keeps; the CPU has no kernels."""
    module = build_module(config).train()
    x = torch.rand(config.data.batch_size, *config.model.image_shape)
    half = HALF.get(config.trainer.precision)
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        kept = kept_bytes(module.model, module.loss, x.to(memory_format=torch.channels_last))
    rows = ((kept.whole, 0), (kept.outside, max(kept.segments)))
    for label, (held, segment) in zip(LABELS, rows, strict=True):
        parts = (held, kept.regularizers, segment)
        texts = "".join(f"{part / GIB:>13.2f}" for part in parts)
        print(f"{'on the CPU':<22}{label:>26}{texts}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--fit", nargs="+", type=float, metavar="GB", help="largest batches")
    parser.add_argument("--eager", action="store_true", help="of a GPU without our kernels")
    parser.add_argument("--measure", action="store_true", help="run real steps as well")
    options = parser.parse_intermixed_args()
    config = composed(options.overrides)
    kernels = not options.eager
    batch, world = config.data.batch_size, config.trainer.world_size
    print(f"{config.name}: batch {batch}, precision {config.trainer.precision}, {world} rank(s)")
    if options.fit:
        print_largest(config, options.fit, kernels)
        return
    columns = ("total", "standing", "activations", "regularizers", "segment")
    print(f"{'GiB':<22}" + "".join(f"{column:>13}" for column in columns))
    for label, e in zip(LABELS, estimates(config, batch, kernels), strict=True):
        print_estimate(label, e)
    if not options.measure:
        return
    if torch.cuda.is_available():
        for recompute, label in enumerate(LABELS):
            words = [*options.overrides, f"checkpoint_cells={bool(recompute)}"]
            peak = fit_steps(compose_steps(words), STEPS).peak_bytes
            print(f"{'measured, ' + label:<32}{peak / GIB:>8.2f}")
    else:
        print_held_on_cpu(config)


if __name__ == "__main__":
    main()
