"""Statistics over rounds, and the tables that show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of what the rounds gave."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(min(values), statistics.median(values), max(values))

    @classmethod
    def of_ratios(cls, values: Sequence[float], bases: Sequence[float]) -> Self:
        """Of the ratios within each round."""
        return cls.of([value / base for value, base in zip(values, bases, strict=True)])

    def __format__(self, unit: str) -> str:
        return f"{self.low:{unit}} / {self.median:{unit}} / {self.high:{unit}}"

    def seconds(self) -> str:
        """As "1.2 / 1.3 / 1.6 ms"."""
        factor, unit = (1000, "ms") if self.median < 1 else (1, "s")
        scaled = Spread(self.low * factor, self.median * factor, self.high * factor)
        return f"{scaled:.3g} {unit}" if scaled.high < 1000 else f"{scaled:.0f} {unit}"


@dataclass(frozen=True)
class Section:
    """What a topic found: text and a table for people, data for programs."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    data: Mapping[str, Any]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        return "\n\n".join([f"## {self.title}", table(self.header, self.rows), *self.notes])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for reading as it is."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target(what: str, value: float, limit: float, *, at_least: bool) -> str:
    """A line that says whether a number that was promised is reached."""
    reached = value >= limit if at_least else value <= limit
    asked = f"at {'least' if at_least else 'most'} {limit:g}"
    return f"- {what}: {value:.2f}, asked for {asked}: {'reached' if reached else '**missed**'}"
