"""Time of drawing images from the prior.

    python -m benchmarks.sample experiment=mnist --batch 16
    python -m benchmarks.sample experiment=celeba64 --batch 64 --device cuda --precision bf16

Any override of train.py goes before the options. The weights are random; time does not depend on
them.
"""

import contextlib

import torch

from benchmarks.measure import PRECISIONS, measure, parser, set_up
from nvae.cli.compose import compose_train
from nvae.cli.train import compile_cells
from nvae.models import NVAE


def main() -> None:
    """Print the time of one batch."""
    options = parser(__doc__).parse_args()
    set_up(options)
    config = compose_train(options.overrides)
    torch.manual_seed(0)
    model = NVAE(config.model).to(options.device).to(memory_format=torch.channels_last).eval()
    if options.compile:
        compile_cells(model)
    dtype = PRECISIONS[options.precision]

    def draw() -> None:
        with torch.autocast(options.device, dtype) if dtype else contextlib.nullcontext():
            model.sample(options.batch, temperature=0.7)

    print(
        f"{' '.join(options.overrides)}: batch {options.batch}, {options.device}, precision "
        f"{options.precision}, {'compiled' if options.compile else 'not compiled'}, "
        f"{options.threads} threads, torch {torch.__version__}"
    )
    print(measure(draw, options.device, options.warmup, options.runs).row("sample", options.batch))


if __name__ == "__main__":
    main()
