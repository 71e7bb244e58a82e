"""One HTML page about a run, with nothing fetched from elsewhere and no script."""

from nvae.report import sections
from nvae.report.markup import Markup, element, joined
from nvae.report.record import RunRecord
from nvae.report.style import CSS

GENERATOR = '<meta name="generator" content="nvae.report">'


def report_page(run: RunRecord) -> str:
    """The whole page."""
    name = run.config.get("name") or run.path.resolve().name
    body = element(
        "main",
        joined(
            [
                sections.head(run),
                sections.curves(run),
                sections.latent_groups(run),
                sections.pictures(run),
                sections.evaluations(run),
                sections.provenance(run),
                sections.configuration(run),
                element("footer", "Written by ", element("code", "python -m nvae.report"), "."),
            ]
        ),
    )
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        GENERATOR,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", f"{name}: training report"),
        element("style", Markup(CSS)),
        "</head>",
        element("body", body),
        "</html>",
    ]
    return "\n".join(lines) + "\n"
