"""The layering of the package, read from its imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nvae"

ORDER = [
    *("settings", "files", "command_line", "random", "torch_file", "gpus", "started"),
    *("pictures", "ops", "models", "regularizers", "elbo", "objective", "published"),
    *("published_settings", "published_very_deep", "checkpoint"),
    *("bn_recalibration", "sampling", "evaluation", "scores", "data", "codec", "report"),
    *("training", "export", "hub", "cli"),
]
"""Each may import those before it."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (imported_from(node.module, alias.name) for alias in node.names)


def imported_from(module: str, name: str) -> str:
    """A submodule where the name is one, else the module itself."""
    path = ROOT / module.replace(".", "/") / name
    return f"{module}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else module


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_lightning_and_hydra_stay_at_the_border(path: Path) -> None:
    """The model, its mathematics, data and kernels must be usable without either."""
    inside = path.relative_to(PACKAGE)
    roots = {name.split(".")[0] for name in imports(path)}
    if inside.parts[0] != "cli":
        assert not roots & {"hydra", "omegaconf"}
        if inside.parts[0] != "training" and inside != Path("data/module.py"):
            assert not roots & {"pytorch_lightning", "lightning"}


def test_every_module_has_its_place() -> None:
    found = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] not in "_."
    }
    assert found - {"py.typed"} == set(ORDER)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    above = set(ORDER[ORDER.index(layer) + 1 :])
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "nvae" and len(parts) > 1:
            assert parts[1] not in above, f"{layer} imports {name}"


def test_there_is_no_cycle_between_modules() -> None:
    """Follow every import of the package; a module must not reach itself."""
    graph: dict[str, set[str]] = {}
    modules = {module_name(path) for path in sources()}
    for path in sources():
        own = module_name(path)
        graph[own] = {found for name in imports(path) if (found := name) in modules} - {own}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for following in sorted(graph[module]):
                visit(following, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
