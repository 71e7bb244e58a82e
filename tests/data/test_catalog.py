"""Data sets by name: nothing but a name finds one, and the printed command prepares the same."""

import shlex
from dataclasses import replace

import pytest

from nvae.data.catalog import config_names, load_config, prepare_command
from nvae.data.manifest import DataError
from nvae.data.prepare import _parser, config_from_arguments


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
    monkeypatch.setattr("nvae.data.catalog.CONFIG_FOLDER", tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        load_config("mine")
    assert "mine.yaml is not valid" in str(error.value)


@pytest.mark.parametrize("name", config_names())
def test_the_command_that_is_printed_prepares_the_same_data_set(name):
    config = replace(
        load_config(name), root="some where", crop_box=[1, 2, 30, 40], image_size=64, channels=3
    )
    words = shlex.split(prepare_command(config))
    assert words[:3] == ["python", "-m", "nvae.data.prepare"]
    assert config_from_arguments(_parser().parse_args(words[3:])) == config
