"""jsonargparse's complaints about options, told in one line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import cast

from acmix.errors import did_you_mean

OPTION = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|Option) '(?P<name>[^']+)'"
)
UNKNOWN_ARGUMENT = re.compile(r"[Uu]nrecognized arguments?: (?:--)?(?P<name>[\w.\-]+)")
UNKNOWN_DATA = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
PARSER_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":')
WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[\w.]+)":(?P<why>.*)Given value: (?P<value>.*)', re.S
)
FIRST_REASON = re.compile(r"Errors:\s*- (?P<reason>[^\n]+)")
EXPECTED = re.compile(r"Expected an? <class '(?P<kind>\w+)'>")


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


def own_words(error: BaseException) -> Exception:
    """What a constructor raised; jsonargparse wraps it where an option is of several types."""
    while str(error).startswith("Does not validate") and error.__cause__ is not None:
        error = error.__cause__
    return cast("Exception", error)


def _unknown_option(name: str, options: Iterable[str]) -> str:
    return f"unknown option {name}{did_you_mean(name, options)}"


def _data_options(kinds: dict[str, type]) -> list[str]:
    return [
        f"data.{name}" for kind in kinds.values() for name in inspect.signature(kind).parameters
    ]


def _reason(message: str) -> str:
    """The message in one line; of a list of what was tried, the first reason."""
    first = FIRST_REASON.search(message)
    return " ".join((first["reason"] if first else message).split())
