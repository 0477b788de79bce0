"""A group of commands that are imported only when they are called."""

# ruff: noqa: ARG002 - the signatures are click's.

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from fabric.cli.exits import reported


class AliasedGroup(click.Group):
    """A click group whose commands also answer to other names, which help does not list.

    Args:
        aliases: Other names, each with its command's.
        *args: As for ``click.Group``.
        **kwargs: As for ``click.Group``.
    """

    def __init__(self, *args: Any, aliases: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._aliases = aliases

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name or another."""
        return super().get_command(ctx, self._aliases.get(cmd_name, cmd_name))


class LazyGroup(click.Group):
    """A click group over a table: name to module and one line of help.

    The command is the attribute of the module that has the command's name. Help and completion
    read the table alone.

    Args:
        table: The commands in the order they are listed.
        *args: As for ``click.Group``.
        **kwargs: As for ``click.Group``.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the table's order."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self._table:
            return None
        command = getattr(importlib.import_module(self._table[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in ``--help``."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name, or an option."""
        names = [
            CompletionItem(name, help=line)
            for name, (_, line) in self._table.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; its errors become one sentence and a documented exit code."""
        with reported(ctx):
            return super().invoke(ctx)
