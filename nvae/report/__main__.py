"""`python -m nvae.report RUN`: a page about a run, `RUN/report.html`."""

from collections.abc import Sequence
from pathlib import Path

from nvae.command_line import Parser, fail, interruptible


def write_report(run: Path, page: Path | None = None) -> Path:
    """Write the page and return its path; an older report is replaced.

    Args:
        run: a run's folder.
        page: the file; None: `report.html` in the folder.

    Raises:
        ValueError: no run there, or ``page`` is something else than a report.
        OSError: the page cannot be written.
    """
    from nvae.files import replacing
    from nvae.report.page import GENERATOR, report_page
    from nvae.report.record import read_run

    page = run / "report.html" if page is None else page
    record = read_run(run)
    if page.exists() and not (page.is_file() and GENERATOR.encode() in _beginning(page)):
        raise ValueError(f"{page} is there already and no report; give another --to")
    text = report_page(record)
    with replacing(page) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # halves of surrogate pairs
    return page


def _beginning(page: Path) -> bytes:
    with page.open("rb") as file:
        return file.read(400)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report; bad input is one line and exit code 2."""
    parser = Parser(
        prog="python -m nvae.report",
        description="Write one HTML page about a run: curves, latent groups, pictures, "
        "evaluations, versions, configuration. It opens from disk and needs no network.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder: runs/digits")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="the page (default: report.html in the folder)"
    )
    given = parser.parse_args(arguments)
    try:
        with interruptible():  # the imports take seconds
            page = write_report(given.run, given.to)
    except (ValueError, OSError) as error:
        raise fail(error) from None
    except (RecursionError, MemoryError) as error:
        raise fail(f"{given.run} asks for too much: {type(error).__name__}") from None
    print(f"written: {page}")


if __name__ == "__main__":
    main()
