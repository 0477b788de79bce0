"""The demonstration: every way in, a site that dies, and the bill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fabric.cli import processes
from fabric.cli.money import su
from fabric.config import Federation
from fabric.sdk import Completion, Fabric

QUESTION = "In one sentence, what is a quasar?"
MAX_TOKENS = 48
DATA_BYTES = 5_000_000_000


def run(
    federation: Federation,
    console: Console,
    run_dir: Path,
    *,
    kill: Callable[[str], object] | None = None,
    more_ways: Mapping[str, Callable[[], str]] = MappingProxyType({}),
) -> None:
    """Ask through each way in, stop the first site abruptly, ask again, show the statement.

    Args:
        federation: What runs.
        console: Where it is shown.
        run_dir: For the Parsl program's files.
        kill: Stops a site abruptly; by default its agent's whole process group is killed.
        more_ways: More ways in by title; each returns what was answered.
    """
    first, *others = federation.sites
    kill = kill or (lambda site: processes.kill(federation.sites[site]))
    with Fabric(federation.base_url, federation.api_key) as fabric:
        number = ("Four", "Five")[len(more_ways)]
        _title(console, f"{number} ways in", "the same question, one federation")
        _show(console, "HTTP, as any OpenAI client or curl", ask_by_http(federation))
        _show(console, "SDK", ask_by_sdk(fabric, first))
        _show(console, "Parsl app", ask_by_parsl(federation, run_dir))
        _show(console, "Command line", ask_by_command(federation))
        for way, ask in more_ways.items():
            console.print(Panel(ask().strip(), title=way, title_align="left", border_style="dim"))
        if others:
            _title(console, f"{first} dies", "all of its processes are killed; nobody is told")
            _fail_over(fabric, first, console, lambda: kill(first))
        _title(console, "The bill", "every charge, and what is left")
        _statement(fabric, console)


def ask_by_http(federation: Federation) -> Completion:
    """Ask with a plain POST and read the reply's ``fabric`` object."""
    reply = httpx.post(
        f"{federation.base_url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {federation.api_key}"},
        json={
            "model": federation.model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        },
        timeout=120,
    )
    return Completion.from_reply(reply.raise_for_status().json())


def ask_by_sdk(fabric: Fabric, data_site: str) -> Completion:
    """Ask with the SDK, saying where the data of the question lives."""
    return fabric.chat(
        QUESTION,
        max_tokens=MAX_TOKENS,
        temperature=0,
        data_site=data_site,
        data_bytes=DATA_BYTES,
    )


def ask_by_parsl(federation: Federation, run_dir: Path) -> Completion:
    """Ask from an app of a Parsl program, on a thread executor of its own."""
    import parsl
    from parsl.config import Config
    from parsl.executors import ThreadPoolExecutor

    from fabric.sdk.parsl import query_app

    config = Config(
        executors=[ThreadPoolExecutor(label="demo", max_threads=1)],
        run_dir=str(run_dir),
        initialize_logging=False,
    )
    with parsl.load(config):
        ask = query_app(
            base_url=federation.base_url,
            api_key=federation.api_key,
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        answer: Completion = ask(QUESTION).result()
    return answer


def ask_by_command(federation: Federation) -> Completion:
    """Ask with ``fabric query`` in a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fabric.cli", "query", QUESTION, "--format", "json"),
            *("--max-tokens", str(MAX_TOKENS), "--temperature", "0"),
        ],
        env={
            **os.environ,
            "FABRIC_BASE_URL": federation.base_url,
            "FABRIC_API_KEY": federation.api_key,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return Completion.from_reply(json.loads(done.stdout))


def _fail_over(fabric: Fabric, site: str, console: Console, kill: Callable[[], object]) -> None:
    with fabric.stream_chat(
        "Tell me a long story about a star.",
        max_tokens=96,
        temperature=0,
        data_site=site,
        data_bytes=DATA_BYTES,
    ) as stream:
        pieces = iter(stream)
        next(pieces)
        kill()
        for piece in pieces:
            if piece.because:
                console.print(f"  [yellow]The stream moved:[/] {piece.because}")
        moved = stream.result
    _show(console, "The stream that was running", moved)
    answer = fabric.chat(QUESTION, max_tokens=MAX_TOKENS, temperature=0, data_site=site)
    states = {s.name: s.state for s in fabric.sites()}
    _show(console, f"Asked again, with data at {site} ({states[site]})", answer)


def _title(console: Console, title: str, subtitle: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/]  [dim]{subtitle}", align="left")


def _show(console: Console, way: str, answer: Completion) -> None:
    rate = f"{answer.tokens_per_s:.0f} tokens/s" if answer.tokens_per_s else ""
    first = f"first token {answer.first_token_s:.2f} s" if answer.first_token_s else ""
    charge = f"{answer.charge_usu / 1e6:.6f} SU"
    attempts = f"{answer.attempts} attempts" if answer.attempts > 1 else ""
    facts = " · ".join(filter(None, [first, rate, charge, attempts]))
    body = Text.assemble(
        answer.text.strip(),
        "\n",
        (f"{answer.site}: ", "bold cyan"),
        (answer.reason.removeprefix(f"{answer.site}: "), "cyan"),
        "\n",
        (facts, "dim"),
    )
    console.print(Panel(body, title=way, title_align="left", border_style="dim"))


def _statement(fabric: Fabric, console: Console) -> None:
    statement = fabric.usage()
    table = Table(box=SIMPLE_HEAD, header_style="bold cyan", pad_edge=False)
    for title in ("WHAT", "SITE", "RUN"):
        table.add_column(title)
    table.add_column("SU", justify="right")
    for line in statement.lines:
        table.add_row(line.kind, line.site, (line.run or "")[:12], su(line.amount_usu))
    console.print(table)
    for account in statement.allocations:
        console.print(
            f"  {account.site}: {su(account.available_usu)} SU available,"
            f" {su(account.held_usu)} SU held",
            highlight=False,
        )
