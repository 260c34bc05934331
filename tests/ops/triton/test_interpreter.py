"""Without a GPU the kernels run in Triton's interpreter: in a process of its own, since Triton
reads the switch when it is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acmix.ops._library import INTERPRETED

TESTS = Path(__file__).parents[2]
# Of the layers those whose attention is of the kernels; 49 taps of aggregation take a minute.
CHOICE = "not test_in_place or ACmix2d or attention"
FILES = [TESTS / "ops/triton/test_kernels.py", TESTS / "layers/test_in_place.py"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run for real")
@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *FILES,
        "-k",
        CHOICE,
        "-x",
        f"--basetemp={tmp_path / 'own'}",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-W", "ignore"],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
