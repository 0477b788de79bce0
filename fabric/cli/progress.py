"""What a person sees on standard error while sites come up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fabric.cli.federation import Plan, SiteStates, Watcher
from fabric.cli.output import STATE_STYLES

console = Console(stderr=True)


@contextmanager
def watching(plan: Plan) -> Iterator[Watcher]:
    """Give a watcher: a table kept up to date on a terminal, a line a change elsewhere."""
    names = ", ".join(site.name for site in plan.sites)
    if not console.is_terminal:
        console.print(f"Starting a hub and the sites {names} ...", highlight=False)
        yield _line_printer()
        return
    started_at = time.monotonic()
    spinner = Spinner("dots", text=f" Starting a hub and the sites {names}")
    with Live(spinner, console=console, refresh_per_second=8, transient=True) as live:
        yield lambda states: live.update(_picture(spinner, states, started_at))
    console.print(
        f"[green]✓[/] The sites {names} are ready ({time.monotonic() - started_at:.0f} s)."
    )


Shower = Callable[[Sequence[Sequence[object]]], None]
"""Is given the lines of a table again and again."""


@contextmanager
def following(heads: Sequence[str], state_column: int) -> Iterator[Shower]:
    """Give what shows a table: kept up to date on a terminal, a line a change elsewhere."""
    if not console.is_terminal:
        seen: set[tuple[object, ...]] = set()

        def print_new(rows: Sequence[Sequence[object]]) -> None:
            for row in rows:
                if tuple(row) not in seen:
                    seen.add(tuple(row))
                    shown = "  ".join(str(cell) for cell in row if cell != "")
                    console.print(f"  {shown}", highlight=False, markup=False)

        yield print_new
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda rows: live.update(_table(heads, state_column, rows))


def _table(
    heads: Sequence[str], state_column: int, rows: Sequence[Sequence[object]]
) -> RenderableType:
    table = Table(box=SIMPLE_HEAD, header_style="bold cyan", padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head)
    for row in rows:
        style = STATE_STYLES.get(str(row[state_column]), "")
        cells = [
            Text(str(cell), style=style if i == state_column else "") for i, cell in enumerate(row)
        ]
        table.add_row(*cells)
    return table


def _picture(spinner: Spinner, states: SiteStates, started_at: float) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, (state, detail) in sorted(states.items()):
        table.add_row(
            "  ", name, Text(state, style=STATE_STYLES.get(state, "")), Text(detail, style="dim")
        )
    spinner.update(text=f" Starting ({time.monotonic() - started_at:.0f} s)")
    return Group(spinner, table)


def _line_printer() -> Watcher:
    seen: dict[str, tuple[str, str]] = {}

    def watch(states: SiteStates) -> None:
        for name, (state, detail) in states.items():
            if seen.get(name) != (state, detail):
                seen[name] = (state, detail)
                console.print(
                    f"  {name}: {state}{f' ({detail})' if detail else ''}",
                    highlight=False,
                    markup=False,
                )

    return watch
