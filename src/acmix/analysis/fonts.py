"""Fonts of this system that have the letters of a text which the usual one lacks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from acmix.errors import few

USUAL = "DejaVu Sans"  # which matplotlib brings
SKIPPED = "Last Resort"  # whose letters are boxes
_said: set[str] = set()  # letters that were told to have no font


@contextmanager
def for_letters_of(figure: Figure) -> Iterator[None]:
    """Within, each text of a figure has fonts for its letters; which have none is said once."""
    texts = texts_of(figure)
    letters = {letter for text in texts for letter in text.get_text() if not letter.isspace()}
    families, missing = families_for(frozenset(letters))
    if len(families) > 1:
        for text in texts:
            text.set_fontfamily(list(families))
    if new := sorted(missing - _said):
        _said.update(new)
        print(
            f"no font of this system shows {few(new)}: pictures have boxes in their place "
            "(a font such as Noto Sans CJK helps)",
            file=sys.stderr,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        yield


def texts_of(figure: Figure) -> list[Text]:
    for axes in figure.axes:  # makes the labels of ticks
        axes.get_xticklabels()
        axes.get_yticklabels()
    return figure.findobj(Text)


@cache
def families_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families, the usual one first, that have the letters together, and letters of no font."""
    missing = letters - letters_of(font_manager.findfont(USUAL))
    families = [USUAL]
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.name):
        if not missing:
            break
        plain = entry.style == "normal" and entry.weight in (400, "normal", "regular")
        if plain and SKIPPED not in entry.name and (found := missing & letters_of(entry.fname)):
            families.append(entry.name)
            missing -= found
    return tuple(families), missing


@cache
def letters_of(path: str) -> frozenset[str]:
    """The letters that a font file has; none of a file that cannot be read."""
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
