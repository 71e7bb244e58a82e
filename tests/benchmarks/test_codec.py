"""The table of compression: every part is measured once, and what is kept is not measured again."""

import sys

import pytest

from benchmarks import codec
from nvae.files import read_json
from tests.cli.checkpoints import write_checkpoint

OPTIONS = ["--images", "12", "--batch", "4", "--profiled", "6", "--lattice", "6", "--steps", "2",
           "--archive", "8"]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*more: str) -> tuple[str, list[str]]:
        """The table, and the parts that were measured."""
        words = ["codec", "model.ckpt", *OPTIONS, "--json", "out/a.json", *more]
        monkeypatch.setattr(sys, "argv", words)
        codec.main()
        said = capsys.readouterr()
        return said.out, [line.partition(":")[0] for line in said.err.splitlines()]

    return call


def test_parts_are_kept(run, tmp_path):
    write_checkpoint(tmp_path / "model.ckpt", bits=8)
    table, parts = run()
    assert parts[:6] == [
        "negative_elbo", "archive 0", "archive 8", "share", "lattice", "PNG, optimized"
    ]  # fmt: skip
    for name in parts[5:]:
        assert f"| {name} | " in table
    assert sum(read_json(tmp_path / "out" / "a.json")["parts"]["share"]["encode"].values()) == (
        pytest.approx(1)
    )
    again, measured = run()
    assert (again, measured) == (table, [])
    assert run("--batch", "2")[1] == parts  # of other settings


def test_codecs_of_images_that_pictures_cannot_hold(run, tmp_path):
    write_checkpoint(tmp_path / "model.ckpt", bits=12, channels=2, image_size=(16, 8))
    assert run()[1][5:] == ["zlib, level 9", "xz, preset 9e"]
