"""The Python of the docs runs, from top to bottom, as its reader would run it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "reports"),
    [
        ("README.md", 1),
        ("docs/convert.md", 3),
        ("docs/predict.md", 0),
        ("docs/detection.md", 0),
        ("docs/segmentation.md", 0),
    ],
)
def test_examples_run(page: str, reports: int, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, example {number}", "exec"), names)
    assert capsys.readouterr().out.count("swapped") == reports
