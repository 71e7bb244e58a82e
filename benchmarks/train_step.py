"""Time of a whole training step: forward, objective, regularizers, backward, optimizer.

    python -m benchmarks.train_step experiment=mnist --batch 16
    python -m benchmarks.train_step experiment=cifar10 --batch 32 --device cuda --precision bf16

Any override of train.py goes before the options. The images are random; time does not depend on
them.
"""

import contextlib

import torch

from benchmarks.measure import PRECISIONS, composed, measure, parser, set_up
from nvae.objective import Loss, Objective
from nvae.training.optimizers import build_optimizer
from nvae.training.recompute import compile_blocks

WHEN = {"step": 15, "total_steps": 100}
"""In the middle of annealing, where balancing is on: the dearest phase."""


def main() -> None:
    """Print the parts of a step and the whole."""
    arguments = parser(__doc__)
    arguments.add_argument("--compile", action="store_true", help="compile every residual cell")
    options = arguments.parse_args()
    set_up(options)
    config = composed(options.overrides)
    torch.manual_seed(0)
    model = config.build_model().to(options.device).to(memory_format=torch.channels_last)
    if options.compile:
        compile_blocks(model)
    objective = Objective(model, config.objective).to(options.device)
    optimizer = build_optimizer(config.optimizer, model.parameters())
    levels = 1 if config.model.likelihood == "bernoulli" else 2**config.model.bits - 1
    x = torch.randint(levels + 1, (options.batch, *config.model.image_shape), device=options.device)
    x = (x / levels).to(memory_format=torch.channels_last)
    dtype = PRECISIONS[options.precision]
    scaler = torch.amp.GradScaler(x.device.type, enabled=options.precision == "fp16")

    def autocast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(x.device.type, dtype) if dtype else contextlib.nullcontext()

    def forward(*, regularize: bool = False) -> Loss:
        with autocast():
            noise = model.draw_noise(options.batch)
            return objective(model, x, noise, regularize=regularize, **WHEN)

    def step() -> None:
        loss = forward(regularize=True)
        total = loss.data if loss.penalty is None else loss.data + loss.penalty
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    size = sum(p.numel() for p in model.parameters())
    print(
        f"{' '.join(options.overrides)}: {size:,} parameters, batch {options.batch}, "
        f"{options.device}, precision {options.precision}, "
        f"{'compiled' if options.compile else 'not compiled'}, {options.threads} threads, "
        f"torch {torch.__version__}"
    )
    for what, call in (
        ("step", step),
        ("forward alone", forward),
        ("regularizers", objective.regularizers),
    ):
        timing = measure(call, options.device, options.warmup, options.runs)
        peak = f"peak {timing.peak_memory:,.0f} MiB"
        print(f"{timing.row(what, options.batch)}  {peak}", flush=True)


if __name__ == "__main__":
    main()
