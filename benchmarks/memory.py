"""Peak memory of a function as the operating system sees it (Linux), kernels' scratch included."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

# For glibc, before the process starts: every tensor of 64 KiB or more gets pages of its own and
# gives them back when it is freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_of(function: Callable[[], object]) -> float:
    """Bytes that running `function` needs above what is resident before it; NaN off Linux."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
