"""Where a row of results comes from."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import acmix

HERE = Path(__file__).parent


def provenance(device: str) -> dict[str, str]:
    """Columns that every row ends with."""

    def git(*command: str) -> str:
        try:
            result = subprocess.run(["git", *command], capture_output=True, text=True, cwd=HERE)
        except OSError:  # no git
            return ""
        return result.stdout.strip()

    dirty = "+changes" if git("status", "--porcelain", "--", "../src") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + dirty,
        "device": device,
        "acmix": acmix.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
