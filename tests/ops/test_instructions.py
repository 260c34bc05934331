"""The CPU kernel with narrower instructions than this machine has: its shapes once more."""

from pathlib import Path

import pytest
from helpers import run_script

from acmix.ops import _native

LEVELS = ["plain", "avx2", "avx512"]
AGAIN = {
    "test_native.py": [
        *("grid_attention", "grid_aggregation", "grid_head_dim", "grid_window"),
        *("half_precision", "half_precision_conversions_are_exact"),
    ],
    "test_native_shift.py": ["grid_channels", "several_tasks", "half_precision"],
}
TESTS = [f"{Path(__file__).with_name(f)}::test_{name}" for f in AGAIN for name in AGAIN[f]]


@pytest.mark.skipif(
    _native.reason() is not None or _native.simd() == "neon", reason="one build for Arm"
)
@pytest.mark.slow
@pytest.mark.parametrize("simd", LEVELS[:-1])
def test_narrower_instructions(simd: str) -> None:
    if LEVELS.index(simd) >= LEVELS.index(_native.simd()):
        pytest.skip(f"{simd} is not narrower than what this machine runs")
    script = f"""
import sys, pytest
from acmix.ops import _native
assert _native.simd() == {simd!r}, _native.simd()
sys.exit(pytest.main([*{TESTS!r}, "-x", "-p", "no:cacheprovider"]))
"""
    assert " passed" in run_script(script, ACMIX_SIMD=simd)
