"""What the documentation tells people to type must work."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_borders import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line.split(" #")[0].strip()


def of_program(program: str) -> list[str]:
    return sorted({line for _, line in commands() if re.match(rf"(\S+ )?python {program}\b", line)})


@pytest.mark.parametrize("line", of_program("train.py"))
def test_train_commands_compose(line: str) -> None:
    """Every key, group and choice exists, and the combination is possible."""
    from nvae.cli.config import compose_train

    words = shlex.split(line)
    words = words[words.index("train.py") + 1 :]
    given = [word for word in words if re.match(r"[\w.]+=", word) and not word.startswith("sweep=")]
    compose_train([word.partition(",")[0] if "-m" in words else word for word in given])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        target
        for _, line in commands()
        if line.startswith("make ")
        for target in line.split()[1:]
        if "=" not in target
    }
    assert {"train", "test"} <= used
    assert used <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:nvae|tests|benchmarks|configs|docs|docker|examples)/[\w./-]+)`", text)
    for name in links:
        assert (page.parent / name).exists(), name
    for name in named:
        if re.search(r"[A-Z]+-[A-Z]+", name):  # a placeholder, such as DEVICE-DATE
            continue
        assert (ROOT / name).exists(), name


def test_presets_table_matches_the_tests() -> None:
    from tests.test_presets import PARAMETERS

    text = (ROOT / "README.md").read_text()
    for name, parameters in PARAMETERS.items():
        assert re.search(rf"\| `{name}` \|.*\| {parameters:,} \|", text), name
