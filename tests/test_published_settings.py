"""Settings of published files: as their authors write them, or refused in one line."""

import json

import pytest

from nvae.published_settings import read_settings
from tests.reference.very_deep import Numbers


@pytest.fixture
def vdvae():
    return Numbers("vdvae")


@pytest.fixture
def evdvae():
    return Numbers("evdvae")


@pytest.mark.parametrize("family", ["vdvae", "evdvae"])
def test_settings_as_dictionary_and_file(family, request):
    numbers = request.getfixturevalue(family)
    as_dictionary = json.loads(numbers.settings.read_text())
    assert read_settings(as_dictionary, family) == numbers.model.config
    assert read_settings(str(numbers.settings), family) == numbers.model.config


def test_settings_as_cfg_file(evdvae, tmp_path):
    """The authors' own files; expressions of lists are worked out, nothing is run."""
    settings = json.loads(evdvae.settings.read_text())
    settings["model"]["up_n_blocks"] = "[1] * 6 + [1]"
    settings["data"]["dataset_source"] = "'cifar-10'"
    lines = []
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
    path = tmp_path / "hparams-run.cfg"
    path.write_text("\n".join(lines))
    assert read_settings(path, "evdvae") == evdvae.model.config
    marker = tmp_path / "ran"
    path.write_text(f"[model]\nup_strides = __import__('pathlib').Path({str(marker)!r}).touch()\n")
    with pytest.raises(ValueError, match=r"data\.num_bits is missing"):
        read_settings(path, "evdvae")
    path.write_text("[model]\nup_strides = [1] * 99999999999\n")
    with pytest.raises(ValueError, match="too long"):
        read_settings(path, "evdvae")
    assert not marker.exists()
    path.write_text("[model]\nup_strides = " + "+".join(["1"] * 3000) + "\n")
    with pytest.raises(ValueError, match=r"data\.num_bits is missing"):
        read_settings(path, "evdvae")


def test_a_data_set_that_is_no_name(vdvae):
    settings = json.loads(vdvae.settings.read_text()) | {"dataset": ["cifar10"]}
    settings = {k: v for k, v in settings.items() if k not in ("input_shift", "input_scale")}
    with pytest.raises(
        ValueError, match="settings given: neither input_shift and input_scale nor a dataset of"
    ):
        read_settings(settings, "vdvae")


def test_authors_spelling_of_a_preset():
    assert read_settings("celebA64_compact", "evdvae") == read_settings(
        "evdvae_celeba64_compact", "evdvae"
    )
    assert read_settings("cifar10", "vdvae").pixel_mean == 120.63838
    with pytest.raises(ValueError, match=r"cifar1 is no preset of vdvae .did you mean"):
        read_settings("cifar1", "vdvae")


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enc_blocks": None}, "enc_blocks is missing"),
        ({"dec_blocks": None}, "dec_blocks is missing"),
        ({"low_bit": "no"}, "low_bit='no' is not true or false"),
        ({"low_bit": None, "dataset": None}, "low_bit is missing: whether the likelihood has 5"),
        ({"input_shift": "x"}, "input_shift='x' is not a number"),
        ({"input_scale": 0}, "input_scale is 0; it must be at least"),
        ({"input_scale": True}, "input_scale=True is not a number"),
        ({"zdim": 4.5}, "model.latent_channels=4.5 is not an integer"),
        ({"image_size": None, "dataset": "mine"}, "image_size is missing"),
    ],
)
def test_settings_of_a_vdvae_that_cannot_be(vdvae, changes, message):
    """None stands for a key that is not there. What shapes cannot say is never guessed."""
    settings = json.loads(vdvae.settings.read_text()) | changes
    settings = without(settings, *(name for name, value in changes.items() if value is None))
    with pytest.raises(ValueError, match=r"^the settings given: ") as error:
        read_settings(settings, "vdvae")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_data_set_says_size_pixels_and_bits_of_a_vdvae():
    blocks = {"enc_blocks": "256x1,256d256,1x1", "dec_blocks": "1x1,256m1"}
    found = read_settings({**blocks, "width": 8, "dataset": "ffhq_256"}, "vdvae")
    assert (found.image_size, found.bits, found.pixel_mean) == (256, 5, 112.8666757481)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("data", "num_bits", None, "data.num_bits is missing"),
        ("data", "num_bits", 5.5, "model.bits=5.5 is not an integer"),
        ("data", "num_bits", float("inf"), "model.bits=inf is not an integer"),
        ("data", "num_bits", "8", "model.bits='8' is not an integer"),
        ("data", "target_res", None, "data.target_res is missing"),
        ("model", "up_strides", None, "model.up_strides is missing"),
        ("model", "distribution_base", None, "model.distribution_base is missing"),
        ("model", "output_gradient_smoothing_beta", None, "smoothing_beta is missing"),
        ("model", "input_kernel_size", [[1], 3], "model.input_kernel_size=[[1], 3] is no square"),
        ("loss", "min_mol_logscale", None, "loss.min_mol_logscale is missing"),
    ],
)
def test_settings_of_an_evdvae_that_cannot_be(evdvae, section, name, value, message):
    settings = json.loads(evdvae.settings.read_text())
    settings[section][name] = value
    if value is None:
        del settings[section][name]
    with pytest.raises(ValueError, match=r"^the settings given: ") as error:
        read_settings(settings, "evdvae")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", ["data", "model", "loss"])
def test_a_section_of_an_evdvae_that_is_none(evdvae, section):
    settings = json.loads(evdvae.settings.read_text())
    with pytest.raises(ValueError, match="must be groups of settings"):
        read_settings(settings | {section: 5}, "evdvae")
    with pytest.raises(ValueError, match=rf"{section}\.\w+ is missing"):
        read_settings(without(settings, section), "evdvae")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1] * 90000] * 90000", "is not a list"),  # 8 billion entries, were they spelled out
        ("[" + "[1] * 1000, " * 101 + "]", "too long"),
    ],
)
def test_a_cfg_file_cannot_grow(evdvae, tmp_path, text, message):
    settings = json.loads(evdvae.settings.read_text())
    settings["model"]["up_n_blocks"] = text
    lines = []
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
    (tmp_path / "hparams.cfg").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / "hparams.cfg", "evdvae")
