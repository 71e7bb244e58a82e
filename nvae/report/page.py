"""One HTML page about a run, with nothing fetched from elsewhere and no script."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from nvae.files import read_bytes
from nvae.report.plots import heat_map, line_chart, number
from nvae.report.record import FINALS, Evaluation, RunRecord, whole

GENERATOR = '<meta name="generator" content="nvae.report">'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
"""What a browser may do for the page, should markup of a stranger get into it after all."""

MOST_PICTURES = 8
MOST_CHARTS = 100
"""Pictures of one kind, and charts of metrics that have no place of their own."""

LONGEST_TEXT = 1000
"""Characters of one piece of a run's text; what is longer loses its middle."""

_WIDEST = 2000
_LARGEST_FILE, _LONGEST_SIDE, _MOST_PIXELS = 1 << 26, 32_000, 1 << 26
"""Bytes, side and pixels of a picture that is read; wider ones than ``_WIDEST`` are reduced."""

_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Negative ELBO", "nats", ("train/negative_elbo", "valid/negative_elbo")),
    ("Reconstruction", "nats", ("train/reconstruction", "valid/reconstruction")),
    ("KL", "nats", ("train/kl", "valid/kl", "train/kl_balanced")),
    ("Bits per dimension", "bits/dim", ("valid/bits_per_dim",)),
    ("Training loss", "nats", ("train/loss",)),
    ("Regularizers", "before weighting", ("train/spectral", "train/batchnorm")),
    ("KL weight", "factor", ("train/beta",)),
    ("Regularization weight", "factor", ("train/lambda",)),
    ("Learning rate", "", ("train/learning_rate",)),
    ("Gradient norm", "before clipping", ("train/gradient_norm",)),
    ("Skipped steps", "steps in all", ("train/skipped_steps",)),
    ("Speed", "images/s", ("train/images_per_second",)),
)
_LINES = {
    "train/kl_balanced": ("train, balanced and weighted", "c2"),
    "train/spectral": ("spectral", "c0"),
    "train/batchnorm": ("batch norm", "c3"),
}
_COLORS = {"train": "c0", "valid": "c1"}

_PROTOCOL = {
    "data.name": "data set", "weights": "weights", "batch_norm": "batch norm",
    "batch_norm.batches": "batch norm recalibrated", "batch_norm.temperature": "at",
    "importance_samples": "K", "seed": "seed", "samples.extractor": "samples by",
    "samples.generated": "generated", "samples.temperature": "temperature",
}  # fmt: skip
"""What tells evaluations apart, and its name on the page."""

_CSS = """
:root { --ink: #1b2430; --soft: #566373; --rule: #d5dbe2; --paper: #ffffff; --panel: #f6f8fa;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0568a; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #a3b0bf; --rule: #364251;
  --paper: #11161d; --panel: #19212b; --c0: #56b4e9; --c1: #f0883e; --c2: #3ccba0;
  --c3: #e29cc6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 0 0 10px; max-width: 75ch; }
small, .soft, .missing, .tile span, .legend, summary, thead th, footer { color: var(--soft); }
.tile span, .legend, thead th, footer { font-size: 13px; } small { font-weight: normal; }
.missing { font-style: italic; }
.tiles, .charts, .pictures { display: grid; gap: 26px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--least, 300px), 100%), 1fr)); }
.tiles { --least: 200px; gap: 12px; margin: 22px 0 12px; } .pictures { --least: 360px; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column;
  justify-content: space-between; break-inside: avoid; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; } .legend b { color: var(--ink); }
.legend i { display: inline-block; width: 14px; height: 3px; margin: 0 5px 4px 0; }
b, table, svg { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
svg text { font-family: inherit !important; }
svg image { image-rendering: pixelated; }
.tips { fill: none; pointer-events: all; }
.wide { overflow-x: auto; } .wide svg { min-width: 880px; margin-bottom: 26px; }
img { display: block; max-width: 100%; height: auto; }
.pictures img { width: 100%; } .wide img { min-width: 720px; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: right; padding: 5px 0 5px 28px; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; }
.facts table { width: 100%; } .facts th { width: 1%; color: var(--soft); }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; padding-left: 18px; }
.config { columns: 3 320px; column-gap: 40px; } .config section { break-inside: avoid; }
p:empty { display: none; }
details, footer { margin: 10px 0 14px; } summary { cursor: pointer; }
code { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""


class Markup(str):
    """Text that is markup already; anything else is escaped."""


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """``<tag attributes>content</tag>``; ``class_`` is class, other underscores are hyphens."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{pairs}>{''.join(map(_escaped, content))}</{tag}>")


def _escaped(value: object) -> str:
    if isinstance(value, Markup):
        return value
    text, half = str(value), LONGEST_TEXT // 2
    short = text if len(text) <= LONGEST_TEXT else f"{text[:half]} ... {text[-half:]}"
    return html.escape(short, quote=True)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """The first column names the row; the table scrolls by itself where it is too wide."""
    body = []
    for first, *others in rows:
        cells = (element("td", cell) for cell in others)
        body.append(element("tr", element("th", first, scope="row"), *cells))
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    return _wide(element("table", top if head else "", element("tbody", *body)))


def picture(path: Path, alternative: str) -> Markup:
    """A PNG's pixels within the page. A file that is no picture is said to be none."""
    try:
        with Image.open(io.BytesIO(read_bytes(path, _LARGEST_FILE)), formats=["PNG"]) as file:
            if max(file.size) > _LONGEST_SIDE or file.width * file.height > _MOST_PIXELS:
                raise ValueError("too large")
            image = file.convert("L" if file.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return _missing(f"{path.name} cannot be read.")
    image.info.clear()
    image.thumbnail((_WIDEST, _LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    sizes = f'width="{image.width}" height="{image.height}"'
    return Markup(f'<img alt="{_escaped(alternative)}" {sizes} src="{data}">')


def report_page(run: RunRecord) -> str:
    """The whole page."""
    name = run.config.get("name") or run.path.resolve().name
    sections = {
        "Training": _curves(run),
        "Latent groups": _latent_groups(run),
        "Pictures": _pictures(run),
        "Evaluation": _joined(map(_evaluation, run.evaluations)) or _missing("None was made."),
        "Starts and versions": _joined(map(_start, run.starts))
        or _missing("There is no starts.jsonl."),
        "Configuration": _configuration(run),
    }
    main = element(
        "main",
        _head(run, name),
        *(element("section", element("h2", title), part) for title, part in sections.items()),
        element("footer", "Written by ", element("code", "python -m nvae.report"), "."),
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{element("title", f"{name}: training report")}
<style>{_CSS}</style>
</head>
{element("body", main)}
</html>
"""


def _head(run: RunRecord, name: str) -> Markup:
    """Name, one line of facts, and the figures that matter."""
    steps = max((points[-1][0] for points in run.series.values()), default=None)
    data = run.settings("data").get("name")
    facts = [
        f"data set {data}" if data else "",
        f"read up to step {steps:,}" if steps is not None else "",
        str(timedelta(seconds=round(run.seconds))) if run.seconds else "",
        str(run.starts[-1].get("device") or "") if run.starts else "",
    ]
    values: list[tuple[str, str]] = []
    if points := run.series.get("valid/negative_elbo"):
        step, best = min(points, key=lambda point: (point[1], point[0]))
        values.append((number(best), f"best validation -ELBO, nats, at step {step:,}"))
    for first in run.evaluations[:1]:
        elbo = first.result["negative_elbo"]["mean"]
        values.append((number(elbo), f"{first.split} -ELBO, nats"))
        for bound in first.result.get("importance_weighted", ()):
            where = f"{first.split} NLL, K = {bound['samples']}"
            values.append((number(bound["nll"]["mean"]), f"{where}, nats"))
            values.append((f"{bound['bits_per_dim']['mean']:.3f}", f"{where}, bits/dim"))
    tiles = (element("div", element("b", value), element("span", what), class_="tile")
             for value, what in values)  # fmt: skip
    return _joined(
        [element("h1", name), element("p", " · ".join(filter(None, facts)), class_="soft"),
         element("div", *tiles, class_="tiles"), *map(_missing, run.notes)]
    )  # fmt: skip


def _curves(run: RunRecord) -> Markup:
    """Every metric of training and validation; those without a place of their own come last."""
    placed = {name for _, _, names in _CHARTS for name in names}
    others = sorted(name for name in run.series.keys() - placed
                    if "_group/" not in name and "_units/" not in name)  # fmt: skip
    charts: list[Markup] = []
    for title, unit, names in (*_CHARTS, *((name, "", (name,)) for name in others[:MOST_CHARTS])):
        lines, legend = [], []
        for name in (name for name in names if name in run.series):
            split = name.split("/")[0]
            label, color = _LINES.get(name, (split, _COLORS.get(split, "c3")))
            lines.append((color, run.series[name]))
            key = element("i", style=f"background: var(--{color})")
            last = element("b", number(run.series[name][-1][1]))
            legend.append(element("span", key, label, " ", last))
        if lines:
            drawn = line_chart(lines, unit, f"chart{len(charts)}-", log=title == "Gradient norm")
            charts.append(_figure(title, drawn, element("div", *legend, class_="legend")))
    if not charts:
        return _missing("No metrics: the run kept no metrics.jsonl.")
    parts = [element("div", *charts, class_="charts")]
    if len(others) > MOST_CHARTS:
        parts.append(_missing(f"{len(others) - MOST_CHARTS} other metrics are not shown."))
    return _joined(parts)


def _latent_groups(run: RunRecord) -> Markup:
    """KL and active units of every group over the steps."""
    maps: list[Markup] = []
    for metric, where in (("valid_kl_group", "validation"), ("train_kl_group", "training")):
        if not maps and (kl := run.groups(metric)):
            drawn = heat_map(kl, "nats, coarsest group first", "kl-")
            maps.append(_figure(f"KL per group, {where}", drawn, wide=True))
    if active := run.groups("valid_active_units"):
        channels = whole(run.settings("model").get("latent_channels"), 1_000_000) or None
        unit = f"of {channels} latent channels" if channels else "latent channels"
        drawn = heat_map(active, unit, "active-", largest=channels)
        maps.append(_figure("Active units, validation", drawn, wide=True))
    return _joined(maps or [_missing("No readings of single groups.")])


def _figure(title: str, drawn: str, legend: str = "", *, wide: bool = False) -> Markup:
    caption = element("figcaption", element("strong", title), legend)
    chart = element("div", Markup(drawn), role="img", aria_label=f"{title} over steps")
    return element("figure", caption, _wide(chart) if wide else chart)


def _pictures(run: RunRecord) -> Markup:
    """Samples and reconstructions as training went on, and those of the end."""
    temperatures = run.settings("callbacks", "pictures").get("temperatures")
    noise = "The likelihood's means from the same noise every time."
    if isinstance(temperatures, list) and temperatures:
        noise += f" Rows: temperature {', '.join(map(str, temperatures))}."
    images = "Validation images above what the model makes of them."
    parts = [
        element("h3", "Samples over time"), _over_time(run.samples, noise),
        element("h3", "Reconstructions over time"), _over_time(run.reconstructions, images),
    ]  # fmt: skip
    for name, title in FINALS.items():
        shown = (_wide(picture(run.finals[name], title)) if name in run.finals
                 else _missing(f"No {name}: training writes it when it ends."))  # fmt: skip
        parts += [element("h3", title), shown]
    return _joined(parts)


def _over_time(files: Sequence[tuple[int, Path]], caption: str) -> Markup:
    if not files:
        return _missing("None were drawn.")
    count = min(MOST_PICTURES, len(files))
    chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
    figures = (element("figure", picture(file, f"step {step}"),
                       element("figcaption", element("small", f"step {step:,}")))
               for step, file in chosen)  # fmt: skip
    left_out = f" {count} of {len(files)} are shown." if count < len(files) else ""
    shown = element("div", *figures, class_="pictures")
    return _joined([element("p", caption + left_out, class_="soft"), shown])


def _evaluation(evaluation: Evaluation) -> Markup:
    """What was measured and how, and what each group carries."""
    result = evaluation.result
    estimates = [
        ("negative ELBO", result["negative_elbo"], result["negative_elbo_bits_per_dim"], None),
        ("reconstruction", result["reconstruction"], {}, None),
        ("KL", result["kl"], {}, None),
        *((f"NLL, K = {bound['samples']}", bound["nll"], bound["bits_per_dim"],
           bound.get("effective_samples")) for bound in result.get("importance_weighted", ())),
    ]  # fmt: skip
    rows = [
        (name, _fixed(nats["mean"], 3), _fixed(nats.get("standard_error"), 3),
         _fixed(bits.get("mean"), 4), _fixed(effective, 1))
        for name, nats, bits, effective in estimates
    ]  # fmt: skip
    heading = f"{evaluation.split}, {result.get('images', '?')} images "
    parts = [
        element("h3", heading, element("small", evaluation.source)),
        element("p", _protocol_line(evaluation.protocol), class_="soft"),
        table(("", "nats", "± standard error", "bits/dim", "effective samples"), rows),
    ]
    if quality := [(name, _fixed(value, 4)) for name, value in evaluation.quality.items()]:
        parts.append(table(("samples", ""), quality))
    kl, active = result.get("kl_per_group"), result.get("active_units")
    if kl and active and len(kl) == len(active):
        channels = result.get("latent_channels", "?")
        groups = [(i, _fixed(nats, 3), f"{units} of {channels}")
                  for i, (nats, units) in enumerate(zip(kl, active, strict=True))]  # fmt: skip
        summary = element("summary", f"{len(groups)} groups, coarsest first")
        head = ("group", "KL, nats", "active units")
        parts.append(element("details", summary, table(head, groups)))
    return _joined(parts)


def _fixed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _protocol_line(protocol: dict[str, Any]) -> str:
    """One line that tells evaluations apart; what the file does not say is left out."""
    said = dict(flat(protocol))
    facts = (f"{label} {value.strip('[]')}" for name, label in _PROTOCOL.items()
             if (value := said.get(name, "")) not in ("null", "", "[]"))  # fmt: skip
    return " · ".join(facts).replace(" · at ", " at ")


def _start(start: dict[str, Any]) -> Markup:
    """Command, code, machine, versions."""
    versions, command = start.get("versions"), start.get("command")
    if isinstance(command, list):
        command = element("code", " ".join(map(str, command)))
    facts = {
        "command": command,
        "resumed from": start.get("resumed_from"),
        "code": start.get("git"),
        "machine": ", ".join(str(start[k]) for k in ("machine", "device") if start.get(k)),
        "python": start.get("python"),
        **(versions if isinstance(versions, dict) else {}),
    }
    known = table((), [(name, value) for name, value in facts.items() if value])
    heading = element("h3", f"From step {start.get('step', '?')}")
    return _joined([heading, element("div", known, class_="facts")])


def _configuration(run: RunRecord) -> Markup:
    """All settings, folded away."""
    if not run.config:
        return _missing("The run kept no config.yaml.")
    groups = {name: value for name, value in run.config.items() if isinstance(value, dict)}
    others = {name: value for name, value in run.config.items() if name not in groups}
    parts = [element("section", element("h3", name), table((), flat(values)), class_="facts")
             for name, values in [("run", others), *groups.items()]]  # fmt: skip
    summary = element("summary", "All settings")
    return element("details", summary, element("div", *parts, class_="config"))


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings with dotted names, as YAML would show them."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            plain = "null" if value is None else str(value)
            rows.append((f"{prefix}{key}", plain.lower() if isinstance(value, bool) else plain))
    return rows


def _wide(content: Markup) -> Markup:
    return element("div", content, class_="wide", tabindex=0)


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup("\n".join(parts))


def _missing(text: str) -> Markup:
    return element("p", text, class_="missing")
