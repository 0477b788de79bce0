"""What a person sees on standard error while sites come up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
