"""`python -m nvae.codec info FILE`: what an archive says of itself, and whether it is whole."""

from collections.abc import Sequence
from pathlib import Path

from nvae.command_line import Parser, brief, fail, interruptible

with interruptible():  # the imports below take seconds
    from nvae.codec.chain import DamagedBlockError
    from nvae.codec.codec import differences
    from nvae.codec.container import Archive


def _parser() -> Parser:
    parser = Parser(
        prog="python -m nvae.codec", description="Look into archives that compress.py made."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info")
    info = commands.add_parser(
        "info", help="what made it, what it holds, and whether its checksums hold"
    )
    info.add_argument("archive", type=Path, metavar="FILE")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Describe an archive; one that is damaged is one line and exit code 2."""
    given = _parser().parse_args(arguments)
    try:
        with interruptible(), Archive.open(given.archive) as archive:
            faults = _describe(archive)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    if faults:
        raise fail(f"{given.archive} is damaged: {faults[0]}")


def _describe(archive: Archive) -> list[str]:
    header = archive.header
    faults = list(archive.lost)
    coded = names = 0
    for place, body in archive.bodies():
        if isinstance(body, DamagedBlockError):
            faults.append(f"block {place.number}: {body}")
        else:
            coded += len(body.coded)
            names += place.length - len(body.coded)
    channels, height, width = header.image_shape
    passes = header.passes
    other = [f"{what} {now}" for what, _, now in differences(header)]
    rows = {
        "images": f"{header.images} of {height}x{width}, {channels} channels, {header.bits} bits",
        "bytes": f"{archive.size:,}: images {coded:,}, names {names:,}",
        "bits/dim": f"{8 * coded / header.pixels:.4f} without names",
        "blocks": f"{header.blocks}",
        "model": f"{header.family}, likelihood {header.likelihood}, {header.checkpoint}",
        "weights": f"SHA-256 {header.model}",
        "passes": f"{passes.batch_size} images, {passes.threads} threads, {passes.precision}",
        "software": ", ".join(f"{name} {version}" for name, version in header.software.items()),
        "processor": header.processor,
        "here": f"cannot be decoded here for sure: {', '.join(other)}" if other else "the same",
    }
    for name, text in rows.items():
        print(f"{name:10} {brief(text)}")
    return faults


if __name__ == "__main__":
    main()
