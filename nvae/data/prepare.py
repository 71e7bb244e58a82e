"""`python -m nvae.data.prepare NAME|FOLDER`: source files -> the local form that training reads."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvae.command_line import Parser, brief, interruptible

with interruptible():  # the imports below take seconds
    from rich.progress import Progress as ProgressBar

    from nvae.data.config import (
        CROPS,
        FOLDER,
        LABELS,
        OPTIONS,
        RESIZES,
        SOURCE_FORMATS,
        DataConfig,
        DataError,
        config_names,
        is_known,
        load_config,
    )
    from nvae.data.conversion import prepare
    from nvae.data.dataset import ImageData
    from nvae.data.places import prepared_folder
    from nvae.data.store import Manifest
    from nvae.settings import Size, plain_size

MOST_WORKERS = 256
_LABELS = {str(choice).lower(): choice for choice in LABELS}


def _size(text: str) -> Size:
    """``64`` or ``96x64``."""
    sides = text.split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() and len(side) < 10 for side in sides):
        raise argparse.ArgumentTypeError(f"{brief(text, 50)!r} is neither SIDE nor HEIGHTxWIDTH")
    return plain_size(tuple(int(side) for side in (sides * 2)[:2]))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m nvae.data.prepare",
        description="Turn source files into the compact local form that training reads.",
    )
    names, formats = ", ".join(config_names()), ", ".join(SOURCE_FORMATS)
    box = ("LEFT", "TOP", "RIGHT", "BOTTOM")
    add = parser.add_argument
    add("data", metavar="NAME|FOLDER", help=f"one of {names}; or a folder")
    add("--source", help="where the source files are")
    add("--root", help="where the prepared form goes (data.root)")
    add("--cache", help="where it goes for a folder without --root (data.cache)")
    add("--format", help=f"kind of source files: {formats}, or package.module:Class")
    add("--size", type=_size, dest="image_size", help="SIDE or HEIGHTxWIDTH (data.image_size)")
    add("--channels", type=int, help="1 gray, 3 color, or as many as the source has")
    add("--bits", type=int, help="levels are 2^bits; matters here beyond 8 (data.bits)")
    add("--floats", action=argparse.BooleanOptionalAction, help="keep float32 (data.floats)")
    add("--value-range", type=float, nargs=2, metavar=("LEAST", "GREATEST"), help="of the source")
    add("--crop", choices=CROPS, help="how pictures get the proportions of --size")
    add("--crop-box", type=int, nargs=4, metavar=box, help="cut this out first")
    add("--resize", choices=RESIZES, help="filter; none refuses pictures of another size")
    add("--labels", choices=[*_LABELS], help="whether class labels are kept (data.labels)")
    add("--image-key", help="name of the images in the source (data.image_key)")
    add("--label-key", help="name of the labels in the source (data.label_key)")
    add("--train-size", type=int, help="training images")
    add("--valid-size", type=int, help="validation images")
    add("--test-size", type=int, help="test images")
    add(
        "--on-corrupt",
        choices=("stop", "skip"),
        default="stop",
        help="an unreadable image is an error, or left out and counted (default: stop)",
    )
    add("--no-download", action="store_true", help="use only files that are there")
    add("--workers", type=int, help="decoding threads")
    return parser


def config_from_arguments(arguments: argparse.Namespace) -> DataConfig:
    """The named config, or that of a folder, with what the command line overrides.

    Raises:
        ValueError: Neither a name nor a folder, or an impossible setting.
    """
    given = Path(arguments.data)
    values: dict[str, Any] = {}
    names = config_names()
    if arguments.data in names or (is_known(arguments.data) and not given.exists()):
        config = load_config(arguments.data)
    elif given.exists():
        config = load_config(FOLDER)
        values["name"] = given.resolve().stem
        values["root"] = str(given)
        if arguments.root is not None:
            values["source"] = str(given)
    else:
        raise DataError(
            f"{brief(arguments.data, 100)} is neither a folder nor a data set; known: "
            f"{', '.join(names)}"
        )
    given_options = {name: getattr(arguments, name) for name in OPTIONS}
    values |= {name: value for name, value in given_options.items() if value is not None}
    # What is stored does not depend on these, and they would contradict what is given.
    if values.get("floats"):
        values["likelihood"] = "normal"
    if values.get("floats") or values.get("bits", 1) > 1:
        values["binarize"] = "none"
    if values.get("image_size") is not None and config.counted_size is not None:
        values["counted_size"] = None
    if "labels" in values:
        values["labels"] = _LABELS[values["labels"]]
    if "value_range" in values:
        values["value_range"] = list(values["value_range"])
    if arguments.no_download:
        values["download"] = False
    return replace(config, **values)


def _report(config: DataConfig, manifest: Manifest) -> None:
    folder = prepared_folder(config)
    for name, split in manifest.splits.items():
        shape = "x".join(map(str, split.shape))
        print(f"{name:>6}: {split.count} images of {shape}")
    if manifest.classes:
        names = brief(", ".join(manifest.classes), 60)
        print(f"labels: {len(manifest.classes)} classes ({names})")
    for line in manifest.skipped_names:
        print(f"skipped {brief(line)}", file=sys.stderr)
    skipped = sum(split.skipped for split in manifest.splits.values())
    if skipped:
        print(f"skipped {skipped} unreadable images (see {folder / 'manifest.json'})")
    print(f"prepared in {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 on success, 1 after one line on what is wrong."""
    try:
        with interruptible():
            _run(_parser().parse_args(argv))
    except MemoryError:
        print("error: there is not enough memory for these files", file=sys.stderr)
        return 1
    except (ValueError, OSError, RecursionError) as error:
        print(f"error: {brief(error)}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and not 1 <= arguments.workers <= MOST_WORKERS:
        raise DataError(f"--workers is {arguments.workers}; allowed: 1 to {MOST_WORKERS}")
    config = config_from_arguments(arguments)
    with ProgressBar(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(config.name, total=None)
        manifest = prepare(
            config,
            skip_bad=arguments.on_corrupt == "skip",
            workers=arguments.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    ImageData(config).setup()
    _report(config, manifest)


if __name__ == "__main__":
    raise SystemExit(main())
