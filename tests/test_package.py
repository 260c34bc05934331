"""The package as a whole: what importing it loads, where its version stands, how it is laid out."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import acmix
from acmix import ops

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_import_is_light() -> None:
    """`import acmix` adds no heavy package to what timm loads, no kernel, and none of its CLI."""
    script = """if True:
        import sys, timm
        before = set(sys.modules)
        import acmix
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        print([n for n, m in sys.modules.items() if n.startswith("acmix.") and hasattr(m, "tl")])
        print(any("_kernel" in line and "acmix" in line for line in open("/proc/self/maps"))
              if sys.platform == "linux" else False)
    """
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded, kernels, library = map(ast.literal_eval, result.stdout.splitlines())
    heavy = {"triton", "lightning", "jsonargparse", "matplotlib", "sklearn", "torchmetrics"}
    assert "acmix" in loaded
    assert not heavy & set(loaded)
    assert kernels == []
    assert library is False


def test_version_stands_in_one_place() -> None:
    assert importlib.metadata.version("acmix") == acmix.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == acmix.__version__


def test_public_names_exist() -> None:
    for module in (acmix, ops):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_every_operator_has_a_reference_and_tests() -> None:
    folders = [
        path for path in (ROOT / "src/acmix/ops").iterdir() if (path / "__init__.py").exists()
    ]
    assert {"window_attention", "weighted_aggregation", "shift_convolution"} <= {
        path.name for path in folders
    }
    for folder in folders:
        assert (folder / "reference.py").exists(), folder.name
        assert (ROOT / f"tests/ops/test_{folder.name}.py").exists(), folder.name


def test_every_public_operator_has_a_benchmark_case() -> None:
    cases = (ROOT / "benchmarks/run.py").read_text()
    operators = [name for name in ops.__all__ if (ROOT / "src/acmix/ops" / name).is_dir()]
    assert len(operators) >= 3
    for name in operators:
        assert f'"{name}"' in cases, name


def test_readme_shows_commands_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^ {4}make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[:2] == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_some_tests_of_every_folder_are_fast(request: pytest.FixtureRequest) -> None:
    tests = request.session.items
    if {test.path.parent for test in tests} < {
        file.parent for file in (ROOT / "tests").rglob("test_*.py")
    }:
        pytest.skip("not the whole suite")
    fast = {test.path.parent for test in tests if test.get_closest_marker("slow") is None}
    assert {test.path.parent for test in tests} == fast
