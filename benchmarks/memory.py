"""Memory of a training step: the estimate beside a measured peak.

    python benchmarks/memory.py experiment=cifar10
    python benchmarks/memory.py experiment=mnist data.batch_size=16 --measure

Overrides are those of train.py. The estimate needs no GPU and runs nothing. `--measure` runs real
steps: on a GPU it prints the allocator's peak; on the CPU the bytes that autograd keeps between
forward and backward, which is the part that the estimate traces.
"""

import argparse

import torch

from nvae.cli.config import TrainConfig, averages_on_device, compose_train
from nvae.cli.train import build_module
from nvae.training.memory import MemoryEstimate, activation_bytes, estimate_memory
from nvae.training.optimizers import build_optimizer

GIB = 2**30


def estimate(config: TrainConfig, recompute: bool) -> MemoryEstimate:
    """The estimate of a configuration, with or without recomputed cells."""
    return estimate_memory(
        config.build_model,
        config.data.batch_size,
        precision=config.trainer.precision,
        checkpoint_cells=recompute,
        average_on_device=averages_on_device(config.callbacks),
    )


def print_estimate(label: str, e: MemoryEstimate) -> None:
    """One line of the table, in GiB."""
    standing = e.weights + e.gradients + e.optimizer + e.average
    print(
        f"{label:<24}{e.total / GIB:>8.2f}{standing / GIB:>10.2f}{e.activations / GIB:>13.2f}"
        f"{e.largest_cell / GIB:>14.2f}"
    )


def measured_on_gpu(config: TrainConfig, recompute: bool) -> int:
    """Peak of the allocator over three whole steps."""
    config.checkpoint_cells = recompute
    module = build_module(config).to("cuda")
    model, objective = module.model, module.loss
    optimizer = build_optimizer(config.optimizer, model.parameters())
    c = config.model
    x = torch.rand(
        config.data.batch_size, c.image_channels, c.image_size, c.image_size, device="cuda"
    ).to(memory_format=torch.channels_last)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.trainer.precision)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", half or torch.float16, enabled=half is not None):
            noise = model.draw_noise(len(x))
            loss = objective(model, x, noise, step=15, total_steps=100)
        (loss.data + loss.penalty).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--measure", action="store_true", help="run real steps as well")
    options = parser.parse_intermixed_args()
    config = compose_train(options.overrides)
    print(
        f"{config.name}: batch {config.data.batch_size}, precision {config.trainer.precision}\n"
        f"{'GiB':<24}{'total':>8}{'standing':>10}{'activations':>13}{'largest cell':>14}"
    )
    estimates = {r: estimate(config, r) for r in (False, True)}
    print_estimate("estimate", estimates[False])
    print_estimate("  cells recomputed", estimates[True])
    if not options.measure:
        return
    if torch.cuda.is_available():
        for recompute, label in ((False, "measured peak"), (True, "  cells recomputed")):
            print(f"{label:<24}{measured_on_gpu(config, recompute) / GIB:>8.2f}")
    else:
        kept, inputs, _ = activation_bytes(
            config.build_model(), config.data.batch_size, config.trainer.precision
        )
        for value, label in ((kept, "measured on the CPU"), (inputs, "  cells recomputed")):
            print(f"{label:<24}{'':>18}{value / GIB:>13.2f}")


if __name__ == "__main__":
    main()
