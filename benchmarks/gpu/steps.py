"""Training steps of the presets as `train.py` runs them: time, memory, and captured against eager.

A step is all of it: forward, likelihood, ELBO, regularizers, backward, guard, optimizer, Lightning.
It is timed by CUDA events at the ends of steps that nothing waits for, so time in which the GPU
waits for the host counts. The KL coefficient is below 1, where balancing is on: the dearest phase.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.fit import Fitted, compose_steps, fit_steps
from benchmarks.gpu.running import Bar, Case, Cases, Emit, Part, Setting
from benchmarks.memory import estimates

PRESETS = {
    "cifar10": ("experiment=cifar10", "data.batch_size=32"),
    "celeba64": ("experiment=celeba64", "data.batch_size=16"),
}
PRECISIONS = {
    "bf16": ("trainer.precision=bf16-mixed",),
    "float32": ("trainer.precision=32",),
    "tf32": ("trainer.precision=32", "trainer.tf32=true"),
}
REFERENCE, KERNELS, COMPILED = "reference", "kernels", "compiled"
CAPTURED, BOTH = "captured", "captured and compiled"
WAYS = {
    REFERENCE: ("kernels=reference", "trainer.cuda_graph=false"),
    CAPTURED: ("kernels=cuda", "trainer.cuda_graph=true"),
    BOTH: ("kernels=cuda", "trainer.cuda_graph=true", "compile=true"),
    KERNELS: ("kernels=cuda", "trainer.cuda_graph=false"),
    COMPILED: ("kernels=cuda", "trainer.cuda_graph=false", "compile=true"),
}
"""Overrides of each way through a step, those that bars judge first."""

DRY = (
    "data=random", "data.batch_size=4", "data.image_size=8", "data.bits=4", "model.bits=4",
    "model.encoder_channels=4", "model.decoder_channels=4", "model.latent_channels=2",
    "trainer.accelerator=cpu", "trainer.cpu_threads=1", "optimizer.warmup_epochs=0",
)  # fmt: skip
"""A network and images that take no time."""

WARM_UP, TIMED = 15, 30
MEMORY_STEPS = 8
EQUAL_STEPS, BAD_STEP = 200, 120
GIB = 2**30


def overrides_of(preset: str, precision: str, way: str, dry: bool) -> tuple[str, ...]:
    """For `train.py`. On the CPU of a dry run nothing is compiled or captured."""
    chosen = (*(DRY if dry else PRESETS[preset]), *PRECISIONS[precision], *WAYS[way])
    if not dry:
        return chosen
    unfit = ("kernels=cuda", "trainer.cuda_graph=true", "compile=true")
    return tuple(word for word in chosen if word not in unfit)


def time_step(emit: Emit, overrides: Sequence[str], dry: bool) -> None:
    """Emit milliseconds, images a second and peak memory of a step."""
    config = compose_steps(overrides)
    warm_up, timed = (1, 2) if dry else (WARM_UP, TIMED)
    fitted = fit_steps(config, warm_up + timed)
    check_captured(overrides, fitted)
    times = fitted.milliseconds[-timed:]
    ms, batch = statistics.median(times), config.data.batch_size
    emit(
        f"{ms:.1f} ms ({min(times):.1f} to {max(times):.1f}), {1e3 * batch / ms:.0f} images/s, "
        f"peak {fitted.peak_bytes / GIB:.1f} GiB",
        ms=ms,
        fastest=min(times),
        slowest=max(times),
        images_per_second=1e3 * batch / ms,
        batch=batch,
        peak_gib=fitted.peak_bytes / GIB,
        loss=float(fitted.losses[-1]),
        tf32=config.trainer.tf32,
        replays=fitted.replays,
        overrides=list(overrides),
    )


def check_captured(overrides: Sequence[str], fitted: Fitted) -> None:
    """Raise where steps that should have been replayed from a graph were not."""
    if "trainer.cuda_graph=true" in overrides and not fitted.replays:
        raise RuntimeError("no step was captured; the log says why")


def step_cases(preset: str) -> Callable[[Setting], list[Case]]:
    """All ways in bfloat16 and float32, then the reference and the captured step in TF32."""

    def cases(setting: Setting) -> list[Case]:
        pairs = [(precision, way) for precision in ("bf16", "float32") for way in WAYS]
        pairs += [("tf32", REFERENCE), ("tf32", CAPTURED)]
        return [
            Case(
                f"{precision} {way}",
                time_step,
                {
                    "overrides": overrides_of(preset, precision, way, setting.dry),
                    "dry": setting.dry,
                },
            )
            for precision, way in pairs
        ]

    return cases


def step_figures(preset: str) -> Callable[[Cases], Iterator[tuple[str, str, str]]]:
    """A row a case, beside the reference of its precision."""

    def figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
        for name, values in cases.items():
            if "ms" not in values:
                continue
            reference = cases.get(f"{name.split()[0]} {REFERENCE}", {}).get("ms")
            beside = f"{reference / values['ms']:.2f}x {REFERENCE}" if reference else ""
            figure = (
                f"{values['ms']:.1f} ms ({values['fastest']:.1f} to {values['slowest']:.1f}), "
                f"{values['images_per_second']:.0f} images/s, {values['peak_gib']:.1f} GiB"
            )
            yield f"step {preset}, batch {values['batch']}, {name}", figure, beside

    return figures


def captured_ms(cases: Cases) -> float | None:
    """The faster of the captured steps in bfloat16."""
    found = [cases.get(f"bf16 {way}", {}).get("ms") for way in (CAPTURED, BOTH)]
    return min((ms for ms in found if ms is not None), default=None)


def captured_speedup(cases: Cases) -> float | None:
    """Over the reference in bfloat16."""
    reference, ms = cases.get(f"bf16 {REFERENCE}", {}).get("ms"), captured_ms(cases)
    return None if reference is None or ms is None else reference / ms


def measure_memory(emit: Emit, overrides: Sequence[str], recompute: bool, kernels: bool) -> None:
    """Emit the estimate for a step, and what some steps have allocated at most."""
    config = compose_steps([*overrides, f"checkpoint_cells={str(recompute).lower()}"])
    estimate = estimates(config, config.data.batch_size, kernels)[recompute]
    emit(f"estimated {estimate.total / GIB:.2f} GiB", estimated_gib=estimate.total / GIB)
    fitted = fit_steps(config, MEMORY_STEPS)
    check_captured(overrides, fitted)
    peak = fitted.peak_bytes
    emit(
        f"allocated {peak / GIB:.2f} GiB, {peak / estimate.total:.2f} times the estimate",
        peak_gib=peak / GIB,
        ratio=peak / estimate.total,
    )


def memory_cases(setting: Setting) -> list[Case]:
    """In bfloat16: all kept and recomputed, without kernels, captured."""
    kinds = ((KERNELS, False), (KERNELS, True), (REFERENCE, False), (CAPTURED, False))
    return [
        Case(
            f"{preset} {way}{', recomputed' if recompute else ''}",
            measure_memory,
            {
                "overrides": overrides_of(preset, "bf16", way, setting.dry),
                "recompute": recompute,
                "kernels": way != REFERENCE,
            },
        )
        for preset in PRESETS
        for way, recompute in kinds
    ]


def memory_figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
    """A row a case."""
    for name, values in cases.items():
        if "ratio" in values:
            estimate = f"{values['ratio']:.2f}x the estimate, {values['estimated_gib']:.2f} GiB"
            yield f"peak memory {name}, bf16", f"{values['peak_gib']:.2f} GiB", estimate


def compare(emit: Emit, overrides: dict[str, Sequence[str]], dry: bool) -> None:
    """Emit how far runs drift from the eager one, in every step and at the end.

    The runs see the same images and noise, go from KL coefficients below 1 to 1, and one step has
    images of NaN. Convolutions take deterministic algorithms, the same in all runs. An eager run
    is repeated: what differs between equal runs is no fault of the capture.

    Args:
        emit: is given the drifts.
        overrides: of the ways to run.
        dry: few steps.
    """
    torch.backends.cudnn.deterministic = True
    steps, bad_step = (10, 5) if dry else (EQUAL_STEPS, BAD_STEP)
    eager: tuple[Tensor, dict[str, Tensor], int] | None = None
    for name, words in overrides.items():
        length = [
            f"trainer.max_steps={steps}",
            "trainer.max_epochs=null",
            "trainer.benchmark=false",
        ]
        fitted = fit_steps(compose_steps([*words, *length]), steps, bad_step)
        weights = {key: w.detach().cpu() for key, w in fitted.module.model.state_dict().items()}
        check_captured(words, fitted)
        here = fitted.losses, weights, fitted.skipped
        del fitted
        if eager is None:
            eager = here
            emit(f"{name}: loss {here[0][0]:.3f} to {here[0][-1]:.3f} nats", skipped=here[2])
            continue
        found = drift(eager, here)
        emit(
            f"{name}: loss differs by {found['loss']:.2g} of itself, weights by "
            f"{found['weights']:.2g}, {found['skipped']} steps left out",
            **{name: found},
        )


def drift(
    eager: tuple[Tensor, dict[str, Tensor], int], other: tuple[Tensor, dict[str, Tensor], int]
) -> dict[str, Any]:
    """How two runs differ; each is losses, state and steps that were left out.

    Returns:
        ``loss``: the largest difference of a finite loss, as a share of it; ``weights``: that of a
        state's tensor, as a share of its norm; ``first``: the first step whose losses differ in a
        bit; ``equal``: no bit differs; ``skipped``: of the other.
    """
    mine, theirs = eager[0], other[0]
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    finite = mine.isfinite() & theirs.isfinite()
    gap = ((theirs - mine).abs() / mine.abs())[finite]
    apart = [
        float((b.double() - a.double()).norm() / a.double().norm().clamp_min(1e-30))
        for a, b in ((a, other[1][key]) for key, a in eager[1].items())
    ]
    equal = bool(same.all()) and all(torch.equal(a, other[1][k]) for k, a in eager[1].items())
    return {
        "loss": float(gap.max()) if bool((mine.isfinite() == theirs.isfinite()).all()) else None,
        "weights": max(apart),
        "first": None if bool(same.all()) else int((~same).int().argmax()),
        "equal": equal,
        "skipped": other[2],
    }


AGAIN = "eager again"
TOLERANCES = {"float32": 1e-3, "bf16": 1e-2}
"""Of a loss, as a share of it, after rounding has had 200 steps to grow."""

SECONDS_OF_EQUALITY = {"float32": 310, "bf16": 215}


def equality_cases(setting: Setting) -> list[Case]:
    """In both precisions: eager, captured, and eager again."""
    return [
        Case(
            precision,
            compare,
            {
                "overrides": {
                    name: overrides_of("cifar10", precision, way, setting.dry)
                    for name, way in (("eager", KERNELS), (CAPTURED, CAPTURED), (AGAIN, KERNELS))
                },
                "dry": setting.dry,
            },
            seconds=SECONDS_OF_EQUALITY[precision],
        )
        for precision in TOLERANCES
    ]


def equality_figures(cases: Cases) -> Iterator[tuple[str, str, str]]:
    """A row a pair of runs."""
    for precision, values in cases.items():
        for name in (CAPTURED, AGAIN):
            if (found := values.get(name)) is None:
                continue
            bits = "the same bits" if found["equal"] else f"other bits from step {found['first']}"
            loss = "-" if found["loss"] is None else f"{found['loss']:.2g}"
            figure = f"loss {loss}, weights {found['weights']:.2g} apart, {bits}"
            skipped = f"{values['skipped']} and {found['skipped']} steps left out"
            yield f"{name} against eager, {precision}, {EQUAL_STEPS} steps", figure, skipped


def is_equal(precision: str) -> Callable[[Cases], float | None]:
    """1 where the captured run is the eager one but for rounding, 0 where it is another."""

    def measured(cases: Cases) -> float | None:
        values = cases.get(precision, {})
        if CAPTURED not in values:
            return None
        found, again = values[CAPTURED], values.get(AGAIN, {})
        allowed = max(TOLERANCES[precision], 3 * (again.get("loss") or 0.0))
        close = found["equal"] or (found["loss"] is not None and found["loss"] <= allowed)
        return float(close and found["skipped"] == values["skipped"])

    return measured


STEPS_BARS = {
    "cifar10": (
        Bar("captured step cifar10, batch 32, bf16, over eager reference", 3.0, "x",
            captured_speedup),
        Bar("captured step cifar10, batch 32, bf16", 70, " ms", captured_ms, at_most=True,
            device="H200"),
    ),
    "celeba64": (
        Bar("captured step celeba64, batch 16, bf16, over eager reference", 3.0, "x",
            captured_speedup),
    ),
}  # fmt: skip
STEPS = tuple(
    Part(f"steps-{preset}", step_cases(preset), step_figures(preset), STEPS_BARS[preset])
    for preset in PRESETS
)
MEMORY = Part("memory", memory_cases, memory_figures)
EQUALITY = Part(
    "equality",
    equality_cases,
    equality_figures,
    tuple(
        Bar(f"captured is eager over {EQUAL_STEPS} steps, {precision} (1: yes)", 1, "",
            is_equal(precision))
        for precision in TOLERANCES
    ),
)  # fmt: skip
