"""Data on standard output: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click
from pydantic import BaseModel

if TYPE_CHECKING:
    from rich.table import Table


FOLDED = 12
"""Letters in a line of a cell that had to be folded, at least."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: numbers are set to the right, ``whole`` cells are never folded."""

    title: str
    numeric: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a command's data goes, in the format that was asked for."""

    is_json: bool = False

    @property
    def is_terminal(self) -> bool:
        """Whether a person is reading."""
        return sys.stdout.isatty()

    def json(self, data: object) -> None:
        """Print data as JSON."""
        click.echo(json.dumps(to_json(data), indent=2, ensure_ascii=False))

    def table(
        self,
        columns: Sequence[str | Column],
        rows: Iterable[Sequence[object]],
        *,
        title: str = "",
        empty: str = "There are none.",
    ) -> None:
        """Print a table: with rules and colours on a terminal, plain columns elsewhere.

        Nothing is cut off: where the terminal is too narrow, long cells are folded, and when that
        is not enough each row is a block of lines.
        """
        heads = [Column(column) if isinstance(column, str) else column for column in columns]
        cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
        if title:
            click.secho(title, bold=True)
        if not cells:
            click.echo(empty, err=True)
        elif self.is_terminal:
            _print_rich(heads, cells)
        else:
            _print_plain(heads, cells)

    def record(self, record: object) -> None:
        """Print one record: as JSON, or a line for each field that says something."""
        fields = to_json(record)
        if self.is_json:
            self.json(fields)
            return
        self.facts(
            [
                (name.replace("_", " "), shown(value))
                for name, value in fields.items()
                if value not in (None, "", {}, [])
            ]
        )

    def facts(self, facts: Sequence[tuple[str, object]]) -> None:
        """Print names and values."""
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            click.echo(click.style(name.ljust(width), fg="cyan") + f"  {value}")


def shown(value: object) -> str:
    """Return a value of a record as people read it, on one line."""
    match value:
        case None:
            return ""
        case list():
            return " ".join(map(shown, value))
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def note(text: str) -> None:
    """Print progress or a remark to standard error."""
    click.echo(click.style(text, dim=True), err=True)


def facts_line(*facts: str | None) -> str:
    """Return the facts that there are, on one line."""
    return " · ".join(fact for fact in facts if fact)


def seconds(value: float | None) -> str:
    """Return a readable duration."""
    return "" if value is None else f"{value:.2f} s"


def short(identifier: str) -> str:
    """Return enough of an identifier such as ``inst_88f050b7…`` to tell it from others."""
    kind, _, digits = identifier.partition("_")
    return f"{kind}_{digits[:8]}" if len(digits) > 8 else identifier


def short_digest(digest: str | None) -> str:
    """Return enough of a digest such as ``sha256:5f70…`` to tell it from others."""
    return "not reported yet" if digest is None else digest[:19]


def to_json(data: object) -> Any:
    """Return data made of records, times and decimals as plain JSON."""
    match data:
        case BaseModel():
            return data.model_dump(mode="json")
        case list() | tuple():
            return [to_json(item) for item in data]
        case set() | frozenset():
            return sorted(data)
        case dict():
            return {str(key): to_json(value) for key, value in data.items()}
        case datetime():
            return data.isoformat()
        case Decimal() | UUID() | Path():
            return str(data)
        case _ if is_dataclass(data) and not isinstance(data, type):
            return to_json(asdict(data))
        case _:
            return data


def _print_plain(heads: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    lines = [[head.title for head in heads], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        padded = [
            cell.rjust(width) if head.numeric else cell.ljust(width)
            for head, cell, width in zip(heads, line, widths, strict=True)
        ]
        click.echo("  ".join(padded).rstrip())


def _print_rich(heads: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console

    console = Console()
    if _least_width(heads, cells) <= console.width:
        console.print(get_rich_table(heads, cells))
        return
    width = max(len(head.title) for head in heads)
    for line in cells:
        click.echo()
        for head, cell in zip(heads, line, strict=True):
            if cell:
                click.echo(click.style(head.title.ljust(width), fg="cyan") + f"  {cell}")


def _least_width(heads: Sequence[Column], cells: Sequence[Sequence[str]]) -> int:
    """Return how wide a table is with its long cells folded, in columns of the terminal."""
    least = 1
    for index, head in enumerate(heads):
        longest = max(len(head.title), *(len(line[index]) for line in cells))
        least += 2 + (longest if head.numeric or head.whole else min(longest, FOLDED))
    return least


def get_rich_table(columns: Sequence[str | Column], rows: Sequence[Sequence[object]]) -> Table:
    """Return a table as it is drawn on a terminal; it has at least one row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    heads = [Column(column) if isinstance(column, str) else column for column in columns]
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, header_style="bold cyan", padding=(0, 1, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(
            head.title,
            justify="right" if head.numeric else "left",
            no_wrap=head.numeric or head.whole,
            overflow="fold",
            min_width=max(len(line[index]) for line in cells) if head.whole else None,
        )
    for line in cells:
        table.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in line))
    return table


STATE_STYLES = {
    "ready": "green",
    "enabled": "green",
    "completed": "green",
    "pending": "yellow",
    "starting": "yellow",
    "loading": "yellow",
    "draining": "yellow",
    "running": "yellow",
    "queued": "yellow",
    "lost": "red",
    "failed": "red",
    "stopped": "red",
    "disabled": "red",
    "revoked": "red",
    "cancelled": "dim",
}
