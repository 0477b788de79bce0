"""What starting a command line costs, its help, and completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from fabric.cli.main import fabric, fabric_admin

HEAVY = "torch parsl fastapi sqlalchemy httpx pydantic rich numpy"


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = f"import sys, fabric.cli.main; print([m for m in {HEAVY.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("group", [fabric, fabric_admin])
def test_every_listed_command_exists_and_helps(group: click.Group) -> None:
    context = click.Context(group)
    for name in group.list_commands(context):
        done = CliRunner().invoke(group, [name, "--help"])
        assert done.exit_code == 0, name
        assert "Usage:" in done.output


def test_help_lists_commands_and_exit_codes() -> None:
    done = CliRunner().invoke(fabric, ["--help"])
    assert re.search(r"explain +Show where a request would run, and why\.", done.output)
    assert "130  interrupted" in done.output


@pytest.mark.parametrize(
    "noun",
    ["site", "model", "project", "user", "key", "grant", "alloc", "rate", "limit", "maintenance"],
)
def test_administrators_have_the_four_verbs(noun: str) -> None:
    command = fabric_admin.get_command(click.Context(fabric_admin), noun)
    assert isinstance(command, click.Group)
    assert {"add", "show", "modify", "delete"} <= set(command.commands)


def complete(words: str) -> list[str]:
    environ = {
        **os.environ,
        "_FABRIC_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    argv = [sys.executable, "-c", "from fabric.cli.main import fabric; fabric(prog_name='fabric')"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_and_options_complete() -> None:
    assert complete("fabric s") == ["status", "sites", "stop"]
    assert complete("fabric query --max") == ["--max-tokens"]
    assert "--version" in complete("fabric --v")


def test_an_unknown_command_ends_with_2() -> None:
    done = CliRunner().invoke(fabric, ["quary"])
    assert done.exit_code == 2
    assert "No such command 'quary'" in done.stderr
