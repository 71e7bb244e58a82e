"""`python -m nvae.export CHECKPOINT --to DIR`: the command line of the export."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nvae.command_line import Parser, brief, fail, interruptible

with interruptible():  # the imports below take seconds
    from nvae.export.folder import export
    from nvae.export.sampler import LARGEST_BATCH
    from nvae.sampling.prior import PixelTemperature, check_pixel_temperature


def _pixel_temperature(text: str) -> PixelTemperature:
    try:
        value: PixelTemperature = "mean" if text == "mean" else float(text)
        check_pixel_temperature(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{brief(repr(text), 100)}; allowed: mean, or a number >= 0"
        ) from None
    return value


def _batch(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= LARGEST_BATCH:
        raise argparse.ArgumentTypeError(
            f"{brief(repr(text), 100)}; it takes a number of images, 1 or more, "
            f"at most {LARGEST_BATCH}"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m nvae.export",
        description="Write a checkpoint's weights as safetensors with a JSON configuration and a "
        "model card, and the sampler as a torch.export program.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file to export")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="a folder, new or empty"
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema",
        help="averaged weights where there are any, or the raw ones (default: ema)",
    )  # fmt: skip
    parser.add_argument(
        "--settings", metavar="PRESET|FILE",
        help="of a published VDVAE or Efficient-VDVAE, whose file does not hold them: a preset of "
        "configs/model, or the authors' JSON or cfg file",
    )  # fmt: skip
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="package.module:Class",
        help="a model, likelihood or cell family of your own that the checkpoint names; once for "
        "each",
    )  # fmt: skip
    parser.add_argument(
        "--pixel-temperature", type=_pixel_temperature, default="mean", metavar="mean|T",
        help="what the sampler gives: the likelihood's mean, or a draw with this factor on the "
        "pixel noise, which it then takes as an input (default: mean)",
    )  # fmt: skip
    samplers = parser.add_mutually_exclusive_group()
    samplers.add_argument(
        "--no-sampler", action="store_true", help="leave the program out: weights and card only"
    )
    samplers.add_argument(
        "--compile", type=_batch, metavar="B",
        help="also compile the sampler to machine code for this machine's processor and batches "
        "of B images; takes a C++ compiler and a minute or more",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Export; bad input is one line and exit code 2, Ctrl-C one line and 130."""
    given = _parser().parse_args(arguments)
    try:
        with interruptible():
            difference = export(
                given.checkpoint,
                given.to,
                weights=given.weights,
                plugins=given.plugin,
                settings=given.settings,
                pixel_temperature=given.pixel_temperature,
                with_sampler=not given.no_sampler,
                compiled_batch=given.compile,
            )
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        raise fail(error) from None
    except (RecursionError, MemoryError) as error:
        raise fail(f"the checkpoint asks for too much: {type(error).__name__}") from None
    print(f"written: {', '.join(sorted(file.name for file in given.to.iterdir()))} in {given.to}")
    if difference is not None:
        print(f"the program agrees with the model to {difference:.0e} a pixel")


if __name__ == "__main__":
    main()
