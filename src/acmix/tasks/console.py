"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """stdout; where that is no terminal, a row stays one line, however long, for grep and logs."""
    return Console() if sys.stdout.isatty() else Console(width=10_000)
