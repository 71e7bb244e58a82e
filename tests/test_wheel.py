"""A wheel alone is enough: configurations inside, commands from any folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from nvae import cli
from tests.test_borders import ROOT


def _run(*words: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_console_script_has_a_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {
        f"nvae-{name}"
        for name in (
            *("train", "sample", "evaluate", "prepare", "report", "export"),
            *("compress", "decompress"),
        )
    }
    for place in scripts.values():
        module, _, name = place.partition(":")
        assert module == "nvae.cli"
        assert callable(import_module(getattr(cli, name).args[0]).main)


@pytest.mark.slow
def test_commands_of_a_wheel(tmp_path: Path) -> None:
    source, site, elsewhere = (tmp_path / name for name in ("source", "site", "elsewhere"))
    elsewhere.mkdir()
    source.mkdir()
    for name in ("nvae", "configs"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--quiet")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", source, "-w", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    _run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    shutil.rmtree(source)
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    configs = site / "nvae" / "configs"
    assert {path.relative_to(configs) for path in configs.rglob("*.yaml")} == shipped

    def command(name: str, *words: str) -> str:
        return _run(site / "bin" / name, *words, cwd=elsewhere, PYTHONPATH=str(site))

    said = command("nvae-train", "debug=fast_run", "name=r", "report.samples=4")
    checkpoint = re.search(r"^checkpoint +(\S+)$", said, re.MULTILINE)
    assert checkpoint is not None
    command("nvae-sample", f"checkpoint={checkpoint[1]}", "seeds=0-3", "output=pictures")
    assert (elsewhere / "pictures" / "grid.png").is_file()
    command(
        "nvae-evaluate", f"checkpoint={checkpoint[1]}", "importance_samples=[]", "output=e.json"
    )
    assert "mnist" in command("nvae-prepare", "--help")
    command("nvae-report", "runs/r")
    command("nvae-export", "--help")
    with_model = f"checkpoint={checkpoint[1]}"
    command("nvae-compress", with_model, "split=test", "output=a.nvae")
    command("nvae-decompress", with_model, "input=a.nvae", "output=restored")
    assert len(list((elsewhere / "restored").iterdir())) == 300
