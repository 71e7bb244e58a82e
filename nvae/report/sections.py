"""The page's sections, each from a run's record; what is missing is said in a word."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvae.report.curves import Line, line_chart
from nvae.report.heat_map import heat_map
from nvae.report.inside import whole
from nvae.report.markup import Markup, element, joined, number, picture, table
from nvae.report.record import Evaluation, Point, RunRecord

MOST_PICTURES = 8

_CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Negative ELBO", "nats", ("train/negative_elbo", "valid/negative_elbo"), False),
    ("Reconstruction", "nats", ("train/reconstruction", "valid/reconstruction"), False),
    ("KL", "nats", ("train/kl", "valid/kl", "train/kl_balanced"), False),
    ("Bits per dimension", "bits/dim", ("valid/bits_per_dim",), False),
    ("Training loss", "nats", ("train/loss",), False),
    ("Regularisers", "before weighting", ("train/spectral", "train/batchnorm"), False),
    ("KL weight", "", ("train/beta",), False),
    ("Regularisation weight", "", ("train/lambda",), False),
    ("Learning rate", "", ("train/learning_rate",), False),
    ("Gradient norm", "", ("train/gradient_norm",), True),
    ("Skipped steps", "in all", ("train/skipped_steps",), False),
    ("Speed", "images a second", ("train/images_per_second",), False),
)
_LABELS = {
    "train/kl_balanced": "train, balanced and weighted",
    "train/spectral": "spectral",
    "train/batchnorm": "batch norm",
}
_COLOURS = {"train": "c0", "valid": "c1"}


def head(run: RunRecord) -> Markup:
    """Name, one line of facts, and the figures that matter."""
    data = run.settings("data")
    steps = max((points[-1][0] for points in run.series.values()), default=None)
    facts = [
        f"data set {data['name']}" if data.get("name") else "",
        f"{steps:,} steps" if steps is not None else "",
        duration(run.seconds) if run.seconds else "",
        str(run.starts[-1].get("device") or "") if run.starts else "",
    ]
    name = run.config.get("name") or run.path.resolve().name
    line = " · ".join(fact for fact in facts if fact)
    return joined(
        [element("h1", name), element("p", line, class_="soft"),
         element("div", *_tiles(run), class_="tiles"),
         *(element("p", note, class_="missing") for note in run.notes)]
    )  # fmt: skip


def _tiles(run: RunRecord) -> list[Markup]:
    values: list[tuple[str, str]] = []
    points = run.series.get("valid/negative_elbo")
    if points:
        step, best = min(points, key=lambda point: (point[1], point[0]))
        values.append((number(best), f"best validation -ELBO, nats, at step {step:,}"))
    if run.evaluations:
        first = run.evaluations[0]
        elbo = first.result["negative_elbo"]["mean"]
        values.append((number(elbo), f"{first.split} -ELBO, nats"))
        for bound in first.result.get("importance_weighted", ()):
            where = f"{first.split} NLL, K = {bound['samples']}"
            values.append((number(bound["nll"]["mean"]), f"{where}, nats"))
            values.append((f"{bound['bits_per_dim']['mean']:.3f}", f"{where}, bits/dim"))
    return [element("div", element("b", v), element("span", what), class_="tile")
            for v, what in values]  # fmt: skip


def duration(seconds: float) -> str:
    """Days, hours and minutes; seconds below a minute."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


def curves(run: RunRecord) -> Markup:
    """Every metric of training and validation; those without a place of their own come last."""
    charts, placed = [], set()
    for title, unit, names, log in _CHARTS:
        placed |= set(names)
        lines = [_line(name, run.series[name], i) for i, name in enumerate(names)
                 if name in run.series]  # fmt: skip
        if lines:
            charts.append(line_chart(title, unit, lines, log=log))
    charts += [
        line_chart(name, "", [_line(name, run.series[name], 0)])
        for name in sorted(set(run.series) - placed)
        if "_group/" not in name and "_units/" not in name
    ]
    if not charts:
        return _section("Training", _missing("No metrics: the run kept no metrics.jsonl."))
    return _section("Training", element("div", *charts, class_="charts"))


def _line(name: str, points: list[Point], index: int) -> Line:
    split = name.split("/")[0]
    colour = "c2" if index == 2 else _COLOURS.get(split, "c3")
    if name == "train/batchnorm":
        colour = "c3"
    return Line(_LABELS.get(name, split), points, colour)


def latent_groups(run: RunRecord) -> Markup:
    """KL and active units of every group over the steps."""
    kl, where = run.groups("valid_kl_group"), "validation"
    if not kl:
        kl, where = run.groups("train_kl_group"), "training"
    active = run.groups("valid_active_units")
    channels = run.settings("model").get("latent_channels")
    maps = []
    if kl:
        maps.append(heat_map(f"KL per group, {where}", "nats, coarsest group first", kl))
    if active:
        largest = whole(channels, 1_000_000)
        unit = f"of {largest} latent channels" if largest else "latent channels"
        maps.append(heat_map("Active units, validation", unit, active, largest=largest or None))
    if not maps:
        maps.append(_missing("No readings of single groups."))
    return _section("Latent groups", *maps)


def pictures(run: RunRecord) -> Markup:
    """Samples and reconstructions as training went on, and those of the end."""
    temperatures = run.settings("callbacks", "pictures").get("temperatures")
    rows = ""
    if isinstance(temperatures, list) and temperatures:
        rows = f" Rows: temperature {', '.join(map(str, temperatures))}."
    parts = [
        element("h3", "Samples over time"),
        _over_time(run.samples, f"The likelihood's means from the same noise every time.{rows}"),
        element("h3", "Reconstructions over time"),
        _over_time(run.reconstructions, "Validation images above what the model makes of them."),
    ]
    for title, name in (
        ("Temperatures, at the end", "samples.png"),
        ("Test images and reconstructions, at the end", "reconstructions.png"),
    ):
        file = run.finals.get(name)
        shown = (
            _strip(file, title)
            if file
            else _missing(f"No {name}: training writes it when it ends.")
        )
        parts += [element("h3", title), shown]
    return _section("Pictures", *parts)


def _over_time(files: Sequence[tuple[int, Path]], caption: str) -> Markup:
    if not files:
        return _missing("None were drawn.")
    count = min(MOST_PICTURES, len(files))
    chosen = sorted({round(i * (len(files) - 1) / max(count - 1, 1)) for i in range(count)})
    figures = [
        element("figure", picture(file, f"step {step}"),
                element("figcaption", element("small", f"step {step:,}")))
        for step, file in (files[i] for i in chosen)
    ]  # fmt: skip
    left_out = f" {len(chosen)} of {len(files)} are shown." if len(chosen) < len(files) else ""
    return joined(
        [element("p", caption + left_out, class_="soft"),
         element("div", *figures, class_="pictures")]
    )  # fmt: skip


def _strip(file: Path, title: str) -> Markup:
    return element("div", picture(file, title), class_="wide", tabindex=0)


def evaluations(run: RunRecord) -> Markup:
    """A table for every evaluation, and what each group carries."""
    if not run.evaluations:
        return _section("Evaluation", _missing("None was made."))
    return _section("Evaluation", *map(_evaluation, run.evaluations))


def _evaluation(evaluation: Evaluation) -> Markup:
    result, line = evaluation.result, _protocol_line(evaluation.protocol)
    rows = [
        _estimate("negative ELBO", result["negative_elbo"], result["negative_elbo_bits_per_dim"]),
        _estimate("reconstruction", result["reconstruction"]),
        _estimate("KL", result["kl"]),
    ]
    for bound in result.get("importance_weighted", ()):
        row = _estimate(f"NLL, K = {bound['samples']}", bound["nll"], bound["bits_per_dim"])
        effective = bound.get("effective_samples")
        rows.append((*row[:-1], "" if effective is None else f"{effective:.1f}"))
    head = ("", "nats", "± standard error", "bits/dim", "effective samples")
    parts = [
        element("h3", f"{evaluation.split}, {result.get('images', '?')} images ",
                element("small", evaluation.source)),
        *([element("p", line, class_="soft")] if line else []),
        table(head, rows),
    ]  # fmt: skip
    quality = [(name, f"{value:.4f}") for name, value in evaluation.quality.items()
               if isinstance(value, float)]  # fmt: skip
    if quality:
        parts.append(table(("samples", ""), quality))
    kl, active = result.get("kl_per_group"), result.get("active_units")
    if kl and active and len(kl) == len(active):
        each = result.get("latent_channels", "?")  # older files: one number for all groups
        channels = each if isinstance(each, list) and len(each) == len(kl) else [each] * len(kl)
        groups = [(i, f"{nats:.3f}", f"{units} of {of}") for i, (nats, units, of)
                  in enumerate(zip(kl, active, channels, strict=True))]  # fmt: skip
        summary = element("summary", f"{len(groups)} groups, coarsest first")
        parts.append(
            element("details", summary, table(("group", "KL, nats", "active units"), groups))
        )
    return joined(parts)


def _protocol_line(protocol: dict[str, Any]) -> str:
    """One line that tells evaluations apart; what the file does not say is left out."""
    data, norm, samples = (
        value if isinstance(value := protocol.get(name), dict) else {}
        for name in ("data", "batch_norm", "samples")
    )
    statistics = protocol.get("batch_norm")
    if norm:
        statistics = f"recalibrated {norm.get('batches')} at {norm.get('temperature')}"
    draws = protocol.get("importance_samples")
    facts = [
        ("data set", data.get("name")),
        ("weights", protocol.get("weights")),
        ("batch norm", statistics),
        ("K", ", ".join(map(str, draws)) if isinstance(draws, list) else None),
        ("seed", protocol.get("seed")),
        ("samples by", samples.get("extractor")),
        ("generated", samples.get("generated")),
        ("temperature", samples.get("temperature")),
    ]
    return " · ".join(f"{name} {value}" for name, value in facts if value not in (None, ""))


def _estimate(
    name: str, nats: dict[str, Any], bits: dict[str, Any] | None = None
) -> tuple[str, ...]:
    error = nats.get("standard_error")
    return (
        name,
        f"{nats['mean']:.3f}",
        "" if error is None else f"{error:.3f}",
        "" if bits is None else f"{bits['mean']:.4f}",
        "",
    )


def provenance(run: RunRecord) -> Markup:
    """Every start: command, code, machine, versions."""
    if not run.starts:
        return _section("Starts and versions", _missing("The run kept no starts.jsonl."))
    parts = []
    for start in run.starts:
        versions, command = start.get("versions"), start.get("command")
        facts = {
            "command": element("code", " ".join(map(str, command)))
            if isinstance(command, list)
            else command,
            "resumed from": start.get("resumed_from"),
            "code": start.get("git"),
            "machine": ", ".join(str(start[k]) for k in ("machine", "device") if start.get(k)),
            "python": start.get("python"),
            **(versions if isinstance(versions, dict) else {}),
        }
        rows = [(name, value) for name, value in facts.items() if value]
        parts += [
            element("h3", f"From step {start.get('step', '?')}"),
            element("div", table((), rows), class_="facts"),
        ]
    return _section("Starts and versions", *parts)


def configuration(run: RunRecord) -> Markup:
    """All settings, folded away."""
    if not run.config:
        return _section("Configuration", _missing("The run kept no config.yaml."))
    top = {k: v for k, v in run.config.items() if not isinstance(v, dict)}
    blocks = {"run": top} | {k: v for k, v in run.config.items() if isinstance(v, dict)}
    sections = [
        element("section", element("h3", name), table((), flat(values)), class_="facts")
        for name, values in blocks.items()
    ]
    summary = element("summary", "All settings")
    return _section(
        "Configuration", element("details", summary, element("div", *sections, class_="config"))
    )


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings with dotted names, as YAML would show them."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _setting(value)))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _section(title: str, *content: Markup) -> Markup:
    return element("section", element("h2", title), *content)


def _missing(text: str) -> Markup:
    return element("p", text, class_="missing")
