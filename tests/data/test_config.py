"""Configurations: a wrong value is one clear line, and nothing but a name finds a data set."""

import shlex
from dataclasses import replace

import pytest

from nvae.data.config import OPTIONS, DataError, config_names, load_config, prepare_command
from nvae.data.places import prepared_folder
from nvae.data.prepare import _parser, config_from_arguments


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"format": "jpg"}, "data.format is 'jpg'; allowed: digits"),
        ({"likelihood": "gauss"}, "allowed: bernoulli"),
        ({"binarize": "yes"}, "allowed: none, dynamic, static"),
        ({"crop": "middle"}, "allowed: none, center, random"),
        ({"resize": "area"}, "allowed: none, nearest"),
        ({"on_device": "gpu"}, "allowed: auto, always, never"),
        ({"on_device": "always", "crop": "random"}, "allowed with it: auto, never"),
        ({"torchvision": "ImageNet"}, "allowed: MNIST"),
        ({"channels": 0}, "data.channels is 0; it must be at least 1"),
        ({"channels": 1025}, "data.channels is 1025; it must be at most 1024"),
        ({"bits": 0}, "data.bits is 0; it must be at least 1"),
        ({"bits": 17}, "data.bits is 17; it must be at most 16"),
        ({"image_size": [8]}, "data.image_size=(8,) is not an integer or a list of two integers"),
        ({"image_size": [8, 0]}, "data.image_size is 0; it must be at least 1"),
        ({"image_size": [8, 12], "pad": 4}, "less than half of data.image_size=[8, 12]"),
        ({"image_size": [8, 12], "counted_size": [8, 9]}, "equal border"),
        ({"image_size": [8, 12], "counted_size": [10, 4]}, "at most data.image_size=[8, 12]"),
        ({"floats": True}, "allowed with it: normal"),
        ({"value_range": [1, 1]}, "two numbers, the lower first"),
        ({"value_range": [1]}, "two numbers"),
        ({"value_range": [0, 1e13]}, "at most 1e+12"),
        ({"labels": "yes"}, "data.labels is 'yes'; allowed: auto, true, false"),
        ({"labels": 1}, "data.labels=1 is not true or false or text"),
        ({"format": "dataset"}, "takes a data.dataset with a _target_"),
        ({"format": "idx", "dataset": {"_target_": "a.b"}}, "takes a data.dataset with a _target_"),
        ({"bits": 8, "binarize": "dynamic"}, "data.bits=1 or data.binarize=none"),
        ({"pad": 4}, "less than half of data.image_size=8"),
        ({"pad": -1}, "at least 0"),
        ({"counted_size": 10}, "at most data.image_size=8"),
        ({"counted_size": 5}, "equal border"),
        ({"crop_box": [0, 0, 5]}, "takes four"),
        ({"crop_box": [5, 0, 5, 9]}, "left < right"),
        ({"batch_size": 0}, "at least 1"),
        ({"num_workers": -1}, "at least 0"),
        ({"train_size": 0}, "at least 1"),
        ({"image_size": 4097}, "data.image_size is 4097; it must be at most 4096"),
        ({"batch_size": 10**9}, "data.batch_size is 1000000000; it must be at most"),
        ({"batch_size": 2.5}, "data.batch_size=2.5 is not an integer"),
        ({"num_workers": 257}, "data.num_workers is 257; it must be at most 256"),
        ({"train_size": 10**12}, "data.train_size is 1000000000000; it must be at most"),
        ({"seed": -1}, "data.seed is -1; it must be at least 0"),
        ({"split_seed": 2**63}, "data.split_seed is"),
        ({"eval_seed": None}, "data.eval_seed=None is not an integer"),
        ({"crop_box": [0, 0, 5, 10**9]}, "data.crop_box is 1000000000; it must be at most"),
        ({"crop_box": "0123"}, "data.crop_box='0123' is not"),
        ({"flip": "yes"}, "data.flip='yes' is not true or false"),
        ({"root": None}, "data.root=None is not text"),
        ({"urls": [1]}, "data.urls=[1] is not a list of text"),
    ],
)
def test_wrong_values_are_one_clear_line(make_config, overrides, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make_config(**overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_stored_size_is_without_the_border(make_config):
    assert make_config(image_size=32, pad=2).stored_size == 28


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../data/cifar10", "/etc/passwd", "cifar10.yaml", "a\0b", "x" * 5000]
)
def test_paths_are_no_names(name):
    with pytest.raises(DataError, match="there is no data set") as error:
        load_config(name)
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "it holds no settings"),
        ("nonsense: 1", "unknown settings: nonsense"),
        ("name: [", "no YAML"),
        ("name: x", "missing"),
        ("a: &a [1]\nb: *a", "aliases"),
    ],
)
def test_a_bad_file_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr("nvae.data.config.CONFIG_FOLDER", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        load_config("mine")
    assert "mine.yaml is not valid" in str(error.value)


@pytest.mark.parametrize("name", config_names())
def test_the_command_that_is_printed_prepares_the_same_data_set(name):
    config = replace(
        load_config(name), root="some where", crop_box=[1, 2, 30, 40], image_size=64, channels=3
    )
    check(config)
    further = {"bits": 12, "value_range": [-5, 4090.5], "labels": True, "label_key": "fine"}
    if config.binarize == "none":
        check(replace(config, image_size=[96, 64], counted_size=None, image_key="x", **further))
    check(replace(config, bits=8, floats=True, binarize="none", likelihood="normal", labels=False))


def check(config):
    """What `OPTIONS` has comes back; the rest is not for preparing."""
    words = shlex.split(prepare_command(config))
    assert words[:3] == ["python", "-m", "nvae.data.prepare"]
    parsed = config_from_arguments(_parser().parse_args(words[3:]))
    assert {name: getattr(parsed, name) for name in OPTIONS} == {
        name: getattr(config, name) for name in OPTIONS
    }
    assert prepared_folder(parsed) == prepared_folder(config)
