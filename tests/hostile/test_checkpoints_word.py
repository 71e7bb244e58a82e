"""A checkpoint's word: the name and shape of its data set, and nothing else.

A stranger's checkpoint says where data lie, where they are fetched from and where they are put.
None of that may be obeyed, whatever the types.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import save_model
from nvae.cli.checkpoint_data import choose_data, open_data
from nvae.cli.evaluate import main as evaluate_main
from nvae.cli.sample import main as sample_main
from nvae.command_line import LONGEST_MESSAGE
from nvae.data.prepare import load_config
from nvae.models import NVAE, ModelConfig
from tests.cli.checkpoints import DATA
from tests.cli.commands import Commands

MODEL = ModelConfig(
    image_size=8, likelihood="logistic_mixture", bits=4, num_mixtures=2, num_scales=1,
    groups_per_scale=1, latent_channels=2, encoder_channels=4, decoder_channels=4,
    preprocess_blocks=0, preprocess_cells=1, postprocess_cells=1, encoder_cells_per_group=1,
    decoder_cells_per_group=1,
)  # fmt: skip
RECORDED = dataclasses.asdict(DATA)
CONFUSION = (
    None, True, -1, 3.5, 10**400, math.nan, math.inf, "", "x", "\x1b[2J", "../../x", "x" * 100_000,
    [], [1], [[]], {}, {"a": 1}, b"\0", torch.zeros(2),
)  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A victim's folder with a configuration file, and a stranger's folder with another one."""
    for name in ("home", "evil", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / ".bashrc").write_text("mine")
    (tmp_path / "evil" / ".bashrc").write_text("theirs")
    monkeypatch.chdir(tmp_path / "work")

    def fetched(*_args, **_kwargs):
        raise AssertionError("something was fetched or prepared")

    monkeypatch.setattr("nvae.data.conversion.download", fetched)
    monkeypatch.setattr("nvae.data.conversion._prepare", fetched)
    monkeypatch.setattr("urllib.request.urlopen", fetched)
    return tmp_path


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write(path: Path, data: Any) -> Path:
    torch.manual_seed(0)
    save_model(NVAE(MODEL), path, {"data": data})
    return path


def _attacks(home: Path) -> dict[str, dict[str, Any]]:
    victim, url = str(home / "home"), f"file://{home}/evil/.bashrc"
    folder = {**RECORDED, "name": "folder", "format": "auto"}
    return {
        "file address": {**folder, "root": victim, "source": victim, "urls": [url]},
        "address, root as here": {**folder, "root": "data/folder", "source": victim, "urls": [url]},
        "other format": {**folder, "name": "mnist", "root": "data/mnist", "format": "folder",
                         "source": victim, "urls": [url]},
        "torchvision": {**folder, "root": victim, "torchvision": "MNIST"},
        "root": {**folder, "root": victim},
        "relative root": {**folder, "root": "../home"},
        "name with a path": {**folder, "name": "../../home/.bashrc"},
        "no set of ours": {**folder, "name": "cats"},
        "in memory by name only": {**RECORDED, "format": "auto", "root": victim, "source": victim,
                                   "urls": [url]},
    }  # fmt: skip


@pytest.mark.parametrize("attack", list(_attacks(Path("."))))
@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_nothing_is_fetched_prepared_or_changed(home, monkeypatch, capsys, attack, command):
    """As it was reported: a file passed on by a stranger replaced a `.bashrc`."""
    checkpoint = _write(home / "stranger.ckpt", _attacks(home)[attack])
    before = _contents(home)
    main = evaluate_main if command == "evaluate" else sample_main
    run = Commands(main, monkeypatch, capsys, home / "work")
    arguments = [f"checkpoint={checkpoint}"]
    arguments += ["importance_samples=[]"] if command == "evaluate" else ["mode=reconstruct"]
    if attack == "in memory by name only":  # the name is one of ours: its own settings count
        run(*arguments, "output=out.json" if command == "evaluate" else "output=out")
    else:
        error = run.fails(*arguments)
        assert "data=" in error or "data.root=" in error
    after = _contents(home)
    assert {path: after[path] for path in before} == before
    written = {Path(path).relative_to(home).parts[0] for path in after.keys() - before.keys()}
    assert written <= {"work"}
    if attack != "in memory by name only":
        assert after == before


def test_a_folder_that_is_typed_is_read(home):
    recorded = {**RECORDED, "name": "folder", "format": "auto", "root": "pictures",
                "urls": ["http://x"], "source": "/", "num_workers": 99}  # fmt: skip
    with pytest.raises(ValueError, match=r"'pictures'.*data\.root=FOLDER"):
        choose_data({}, {"data": recorded})
    chosen = choose_data({"root": "pictures"}, {"data": recorded})
    assert chosen.prepare
    here = load_config("folder")
    assert chosen.config.root == "pictures"
    for name in ("source", "urls", "format", "torchvision", "num_workers", "download"):
        assert getattr(chosen.config, name) == getattr(here, name)
    assert (chosen.config.image_size, chosen.config.bits) == (8, 4)
    assert chosen.config.train_size == RECORDED["train_size"]


def test_the_configured_root_needs_no_word(home):
    """Not prepared there: the error says how; the same with the folder's full name."""
    for root in ("data/folder", str(Path("data/folder").absolute())):
        chosen = choose_data({}, {"data": {**RECORDED, "name": "folder", "root": root}})
        assert not chosen.prepare
        with pytest.raises(ValueError, match=r"python -m nvae\.data\.prepare folder"):
            open_data(chosen, MODEL)


def test_a_strangers_text_is_short_and_without_control_characters(home):
    recorded = {**RECORDED, "name": "folder", "root": "\x1b[31m" + "x" * 1_000_000}
    with pytest.raises(ValueError, match="folder") as error:
        choose_data({}, {"data": recorded})
    assert str(error.value).isprintable()
    assert len(str(error.value)) < LONGEST_MESSAGE


def test_no_memory_is_taken_on_a_checkpoints_word(home):
    chosen = choose_data({}, {"data": {**RECORDED, "train_size": 90_000_000}})
    with pytest.raises(ValueError, match="in memory; give data=random"):
        open_data(chosen, MODEL)


@pytest.mark.parametrize("value", CONFUSION, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("name", ["random", "folder"])
def test_every_key_of_every_type(home, name, value):
    """Whatever stands at any key, it is a data set that works or one clear error."""
    before = _contents(home)
    for key in (*RECORDED, "cache", "nonsense", None):
        recorded = {**RECORDED, "name": name, "root": load_config(name).root}
        run_config: dict[str, Any] = {"data": value if key is None else {**recorded, key: value}}
        with contextlib.suppress(ValueError, OSError):
            open_data(choose_data({}, run_config), MODEL)
    assert _contents(home) == before
