"""Every setting of `sample.py` and `evaluate.py`, found in the schema, with wrong values."""

import dataclasses
import math
import typing
from typing import Any

import pytest

from nvae.bn_recalibration import RecalibrationSettings
from nvae.cli.common import open_device
from nvae.cli.compress import CompressConfig
from nvae.cli.decompress import DecompressConfig
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.sample_config import MOST_NUMBERS, SampleConfig, integers
from nvae.cli.schema import build, schema_of
from nvae.command_line import brief
from nvae.evaluation import BoundSettings
from nvae.evaluation.distances import DistanceSettings
from nvae.sampling import interpolate, prior_latents, sample_images, scale_temperatures, slerp
from nvae.sampling.latents import traverse
from tests.sampling.models import small_nvae

REQUIRED: dict[type, dict[str, Any]] = {
    SampleConfig: {"checkpoint": "x"},
    EvaluateConfig: {"checkpoint": "x"},
    CompressConfig: {"checkpoint": "x", "output": "y", "split": "test"},
    DecompressConfig: {"checkpoint": "x", "input": "y", "output": "z"},
    BoundSettings: {},
    DistanceSettings: {},
    RecalibrationSettings: {"temperature": (1.0,)},
}
NO_NUMBERS = (math.nan, math.inf, -math.inf, 10**19, -(10**19), 10**400, 1e308)


def _numeric(kind: Any) -> bool:
    return kind in (int, float, Any) or any(_numeric(arg) for arg in typing.get_args(kind))


def _id(value: Any) -> Any:
    return getattr(value, "__name__", value)


def _fields(config: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(config)
    return [(f.name, hints[f.name]) for f in dataclasses.fields(config)]


CASES = [(config, *field) for config in REQUIRED for field in _fields(config)]
NUMBERS = [case for case in CASES if _numeric(case[2])]


def _named(error: pytest.ExceptionInfo[ValueError], name: str) -> None:
    message = str(error.value)
    assert message.startswith(name) or f"{name} " in message or f"{name}=" in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("config", "name", "kind"), NUMBERS, ids=lambda v: getattr(v, "__name__", v)
)
def test_no_number_but_a_finite_one(config, name, kind):
    """The wrong setting is named and not its neighbor."""
    for number in NO_NUMBERS:
        is_list = typing.get_origin(kind) in (list, tuple) or "list" in str(kind)
        values = [number, [number]] if kind is Any else [[number] if is_list else number]
        for value in values:
            with pytest.raises(ValueError, match=name) as error:
                config(**{**REQUIRED[config], name: value})
            _named(error, name)


@pytest.mark.parametrize(("config", "name", "kind"), CASES, ids=_id)
def test_every_type_works_or_is_one_line(config, name, kind):
    lines = []
    for value in (None, True, -1, 2.5, "", "x", [], [[]], [None], {}, {"a": 1}, object(), b"x"):
        try:
            config(**{**REQUIRED[config], name: value})
        except ValueError as error:
            lines.append(str(error))
    assert not [line for line in lines if "\n" in line or "object at 0x" in brief(line)]


def test_the_composed_number_is_named_before_settings_are_compared():
    """`generated=nan` must not blame `kid_subset_size`, which is compared with it."""
    from omegaconf import OmegaConf

    composed = OmegaConf.structured(schema_of(EvaluateConfig))
    composed.checkpoint, composed.temperature, composed.metrics = "x", math.nan, ["kid"]
    with pytest.raises(ValueError, match=r"^temperature is nan; it must be a finite number$"):
        build(EvaluateConfig, composed)


@pytest.mark.parametrize(
    "value",
    ["0-1000000000000", "0-9223372036854775807", [f"0-{MOST_NUMBERS}"], "0-" + "9" * 30,
     "0-" + "9" * 6000, ["0-999999", "1000000-1999999"]],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_ranges_are_counted_before_they_are_spelled_out(value):
    """The first of these took 14 GB."""
    with pytest.raises(ValueError, match=r"seeds.*(more than 1,000,000|too large)"):
        integers("seeds", value)


@pytest.mark.parametrize("value", ["1e12", "0-1e12", "-1", "1-", "--", "0x10", "½", 1e12, None, {}])
def test_other_texts_are_no_numbers(value):
    with pytest.raises(ValueError, match=r"images=.* is no number or range"):
        integers("images", value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"importance_samples": [10**20]}, "importance_samples"),
        ({"importance_samples": [10**8]}, "at most 1e"),
        ({"importance_samples": list(range(1, 5000))}, "more than 1000 values"),
        ({"elbo_samples": 10**9}, "elbo_samples is"),
        ({"chunk": 10**9}, "chunk is"),
        ({"generated": 10**12}, "generated is"),
        ({"kid_subsets": 10**9}, "kid_subsets is"),
    ],
)
def test_what_would_take_years_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig("x", **settings)


@pytest.mark.parametrize(
    "name",
    ["", "cuda:", "cuda:-1", "cuda:1:1", "cpu:3", "meta", "mps", "CPU", "cuda:0x1",
     "cuda:" + "9" * 50, "cpu\n", "0", "\x1b[2J"],
)  # fmt: skip
def test_devices_that_are_none(name):
    with pytest.raises(ValueError, match=r"allowed: auto, cpu|CUDA device"):
        open_device(name, tf32=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_temperatures_that_are_none_raise_from_python_too(bad):
    import torch

    model = small_nvae()
    latents = prior_latents(model, torch.tensor([0, 1]))
    calls = [
        lambda: sample_images(model, [0], temperature=bad),
        lambda: sample_images(model, [0], temperature=[bad] * len(model.groups)),
        lambda: sample_images(model, [0], pixel_temperature=bad),
        lambda: prior_latents(model, torch.tensor([0]), bad),
        lambda: scale_temperatures(model.config, [bad] * model.config.num_scales),
        lambda: interpolate(model, latents, latents, bad),  # type: ignore[arg-type]
        lambda: traverse(model, latents, 0, bad, torch.tensor([0, 1])),  # type: ignore[arg-type]
        lambda: RecalibrationSettings((bad, 1.0)),
    ]
    if not math.isfinite(bad):
        calls.append(lambda: slerp(latents.noise[0], latents.noise[0], bad))
    for call in calls:
        with pytest.raises(ValueError, match=r"temperature|position|steps"):
            call()


def test_pictures_of_numbers_that_are_not_finite_are_none():
    """A draw of black and white pixels from NaN would look like a picture."""
    import torch

    model = small_nvae()
    with torch.no_grad():
        model.initial_state.fill_(math.nan)
    for pixels in ("mean", 1.0, 0.0):
        with pytest.raises(FloatingPointError, match="seed 7"):
            sample_images(model, [7, 8], pixel_temperature=pixels)
