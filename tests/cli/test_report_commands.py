"""A printed command, pasted into a shell and read by Hydra, means what it says."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from nvae.cli.report import command, root_to_give, tensorboard
from nvae.command_line import setting
from nvae.data import DataConfig

VALUES = (
    "runs/r/best.ckpt", "my cats", "a'b", 'a"b', "a=b", "x,y", "[1]", "{a}", "a\\b", "end\\",
    'both\\"', "$(rm -rf .)", "~/x", "a;b", "(x)", "#1", "  two", "null", "été", "1e3", "-rf",
)  # fmt: skip


def _meant(printed: str) -> dict[str, object]:
    _, _, *words = shlex.split(printed)
    parsed = OverridesParser.create().parse_overrides(words)
    return {override.key_or_group: override.value() for override in parsed}


@pytest.mark.parametrize("value", VALUES)
def test_command_is_read_as_it_was_meant(value: str) -> None:
    printed = command("sample.py", checkpoint=value, data__root=value, mode=None)
    expected = None if value == "null" else 1000.0 if value == "1e3" else value
    meant = {key: getattr(v, "text", v) for key, v in _meant(printed).items()}
    assert meant == {"checkpoint": expected, "data.root": expected}


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1))
def test_paths_survive(name: str) -> None:
    path = f"runs/{name}/best.ckpt"
    value = _meant(command("evaluate.py", checkpoint=path))["checkpoint"]
    assert getattr(value, "text", value) == path


def test_lists_and_folders() -> None:
    assert setting("temperature", [0.7, 1.0]) == "temperature=[0.7,1]"
    assert shlex.split(tensorboard(Path("a'b c"))) == ["tensorboard", "--logdir", "a'b c"]


def _data(name: str, kind: str, root: str) -> DataConfig:
    return DataConfig(
        name=name, format=kind, root=root, image_size=8, channels=1, bits=8,
        likelihood="logistic_mixture",
    )  # fmt: skip


def test_root_is_given_where_the_configuration_has_another() -> None:
    assert root_to_give(_data("folder", "auto", "data/folder")) is None
    assert root_to_give(_data("folder", "auto", "./data/folder/")) is None
    assert root_to_give(_data("folder", "auto", "/pictures of cats")) == "/pictures of cats"
    assert root_to_give(_data("of my own", "folder", "x")) == "x"
    assert root_to_give(_data("random", "random", "x")) is None
