"""Ranges of numbers as part of an option's type: `Annotated[float, Range(0, 1)]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Finite numbers from `low` to `high`, both among them unless said otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is not among them
    below: bool = False  # nor high

    def holds(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under and math.isfinite(value)

    def __str__(self) -> str:
        if self == Range():
            return "a finite number"
        if self.above:
            upper = f", {'below' if self.below else 'at most'} {self.high:.10g}"
            return f"above {self.low:.10g}" + (upper if self.high < math.inf else "")
        if self.high == math.inf:
            return f"at least {self.low:.10g}"
        return f"{self.low:.10g} to {'below ' if self.below else ''}{self.high:.10g}"


Number = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Part = Annotated[float, Range(0, 1)]
PartBelowOne = Annotated[float, Range(0, 1, below=True)]
PositivePart = Annotated[float, Range(0, 1, above=True)]
PositivePartBelowOne = Annotated[float, Range(0, 1, above=True, below=True)]
Count = Annotated[int, Range(0)]
PositiveCount = Annotated[int, Range(1)]


def check_ranges(init: Callable[..., Any], values: Mapping[str, Any], prefix: str) -> None:
    """Hold values against the ranges in the annotations of the function that takes them.

    Raises:
        ValueError: With the first that lies outside, as "model.lr: expected above 0, got -1".
    """
    for name, kind in get_type_hints(init, include_extras=True).items():
        for wanted, value in _ranged(kind, values.get(name)):
            if not wanted.holds(value):
                raise ValueError(f"{prefix}{name}: expected {wanted}, got {values[name]}")


def _ranged(kind: Any, value: Any) -> Iterator[tuple[Range, float]]:
    """Each number within a value, with the range that its place in the type asks for."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if get_origin(kind) is Annotated:
            yield from ((part, value) for part in kind.__metadata__ if isinstance(part, Range))
        else:  # of a union
            for part in get_args(kind):
                yield from _ranged(part, value)
    elif isinstance(value, list | tuple) and get_args(kind):
        kinds = [part for part in get_args(kind) if part is not type(None) and part is not ...]
        if get_origin(kind) in (list, tuple):
            kinds = kinds if len(kinds) == len(value) else kinds[:1] * len(value)
            for part, one in zip(kinds, value, strict=True):
                yield from _ranged(part, one)
        else:
            for part in kinds:
                yield from _ranged(part, value)
