"""Mistakes of the user, told in one line."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

OPTION = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<name>[^']+)'"
)
UNKNOWN_ARGUMENT = re.compile(r"[Uu]nrecognized arguments?: (?:--)?(?P<name>[\w.\-]+)")
UNKNOWN_DATA = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
PARSER_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":')
WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[\w.]+)":(?P<why>.*)Given value: (?P<value>.*)', re.S
)
WORKER = re.compile(r"Caught \w+ in DataLoader worker process .*^\w+: (?P<reason>.*)", re.S | re.M)
FIRST_REASON = re.compile(r"Errors:\s*- (?P<reason>[^\n]+)")
EXPECTED = re.compile(r"Expected an? <class '(?P<kind>\w+)'>")


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


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds into a `UserError` of one line."""
    try:
        yield
    except kinds as error:
        raise UserError(one_line(error)) from error


def one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return _reason(str(error))


def _reason(message: str) -> str:
    """The message in one line.

    Of jsonargparse's list of what was tried, the first reason; of the traceback from a process
    that loads images, its end.
    """
    first = FIRST_REASON.search(message) or WORKER.search(message)
    return " ".join((first["reason"] if first else message).split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def explain_parser(message: str, options: list[str], kinds: dict[str, type]) -> str:
    """jsonargparse's message in one line, with the nearest option where one is unknown.

    options: every option of the command, such as "model.name"; kinds: the classes that `--data`
    takes by name.
    """
    if unknown := UNKNOWN_ARGUMENT.search(message):
        return _unknown_option(unknown["name"], options)
    if unknown := UNKNOWN_DATA.search(message):
        name = unknown["name"]
        return f"unknown data {name!r}{did_you_mean(name, kinds)} (known: {', '.join(kinds)})"
    if unknown := OPTION.search(message):
        group = unknown["group"] or "data"
        known = options if unknown["group"] else _data_options(kinds)
        return _unknown_option(f"{group}.{unknown['name']}", known)
    if wrong := WRONG_VALUE.search(message):
        expected = [kind for kind in EXPECTED.findall(wrong["why"]) if kind != "NoneType"]
        if expected:
            return f"{wrong['key']}: expected {' or '.join(expected)}, got {wrong['value']!r}"
    key = PARSER_KEY.match(message)
    return f"{key['key']}: {_reason(message[key.end() :])}" if key else _reason(message)


def _unknown_option(name: str, options: Iterable[str]) -> str:
    return f"unknown option {name}{did_you_mean(name, options)}"


def _data_options(kinds: dict[str, type]) -> list[str]:
    return [
        f"data.{name}" for kind in kinds.values() for name in inspect.signature(kind).parameters
    ]
