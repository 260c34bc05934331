"""A bar for what may take seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

SECONDS_UNTIL_SHOWN = 2.0

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items; on a terminal with a bar, from two seconds on and only while it lasts."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=len(items))
    shown, started = False, time.monotonic()
    try:
        for item in items:
            late = time.monotonic() - started > SECONDS_UNTIL_SHOWN
            if late and not shown and console.is_terminal:
                progress.start()
                shown = True
            yield item
            progress.advance(task)
    finally:
        if shown:
            progress.stop()
