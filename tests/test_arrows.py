"""Arrows point down: what imports what within the package, in its layers and without circles."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
# Each imports those before it, and itself; what stands on one line does not import one another.
LAYERS = [
    {"errors", "ranges"},
    {"ops"},
    {"layers"},
    {"models"},
    {"detection", "segmentation"},
    {"surgery", "analysis", "data"},
    {"tasks"},
    {"cli"},
]
ALLOWED = {("acmix.analysis.environment", "acmix")}  # for its version, when it is asked
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCES / "acmix").rglob("*.py")
}


def imported(source: str) -> Iterator[str]:
    """Modules of the package that a source imports, at its top or within its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for name in node.names:
                below = f"{node.module}.{name.name}"
                if below in MODULES or node.module in MODULES:
                    yield below if below in MODULES else node.module


def height(part: str) -> int:
    """The package itself, which offers names of most parts, stands above them."""
    return HEIGHT[part] if part else len(LAYERS)


def arrows_up(module: str, source: str) -> list[str]:
    """Of the imports those that reach into a part that does not stand below."""
    part = part_of(module)
    return [
        name
        for name in imported(source)
        if part_of(name) != part and height(part_of(name)) >= height(part)
    ]


def part_of(module: str) -> str:
    return module.partition(".")[2].split(".")[0]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"acmix"}))
def test_no_arrow_points_up(module: str) -> None:
    found = arrows_up(module, MODULES[module].read_text())
    assert [name for name in found if (module, name) not in ALLOWED] == []


def test_an_arrow_up_is_seen() -> None:
    assert arrows_up("acmix.ops.x", "def f():\n    from acmix.tasks import command") == [
        "acmix.tasks.command"
    ]
    assert arrows_up("acmix.data.x", "import acmix.analysis.costs") == ["acmix.analysis.costs"]
    assert arrows_up("acmix.data.x", "from acmix import errors, ACmix2d") == ["acmix"]


def test_no_circles() -> None:
    graph = {module: set(imported(path.read_text())) for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
