"""Mistakes of the user, told in one line."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

WORKER = re.compile(r"Caught \w+ in DataLoader worker process .*^\w+: (?P<reason>.*)", re.S | re.M)

LONGEST = 600  # letters of a message: others' hold whole lists


class UserError(Exception):
    """A mistake of the user: the message says in one line what was expected and what came."""


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are ours: one line, exit code 2."""

    def __init__(
        self, prog: str, description: str, examples: str, usage: str | None = None
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def check_one_of(option: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        offer = did_you_mean(name, known)
        raise UserError(f"{option}: unknown {name!r}{offer} (known: {', '.join(known)})")


def image_size(text: str) -> tuple[int, int]:
    """An option's value, S or HEIGHTxWIDTH, in pixels."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected S or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(sides[0]), int(sides[-1])


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds into a `UserError` of one line."""
    try:
        yield
    except BrokenPipeError:  # of stdout: its reader has seen enough
        raise
    except kinds as error:
        raise UserError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """What it says, cut where it is long; of the traceback of another process, the end."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = str(error) or type(error).__name__
    from_worker = WORKER.search(message)
    text = " ".join((from_worker["reason"] if from_worker else message).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 100]} [...] {text[-90:]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def few(names: Iterable[object], limit: int = 3) -> str:
    """The first of a list, and how many more there are: no message grows with its list."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def printable(text: str) -> str:
    """The text on one line: what no terminal shows, such as a line break, is spelt out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
