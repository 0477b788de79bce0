"""Tables, JSON and amounts."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.cli.money import SU, su
from fabric.cli.output import Column, Output, facts_line, short
from fabric.messages import Candidate


@pytest.mark.parametrize(
    ("amount_usu", "text"),
    [
        (0, "0.000000"),
        (1, "0.000001"),
        (-1, "-0.000001"),
        (12_000_345, "12.000345"),
        (-1_500_000, "-1.500000"),
        (1_234_567_000_000, "1,234,567.000000"),
    ],
)
def test_amounts_read_as_su(amount_usu: int, text: str) -> None:
    assert su(amount_usu) == text


@given(st.integers(min_value=-(10**18), max_value=10**18))
def test_amounts_survive_being_written_and_read(amount_usu: int) -> None:
    assert SU.convert(su(amount_usu), None, None) == amount_usu


@pytest.mark.parametrize("text", ["ten", "", "1.0000001", "NaN", "inf", "1e-7"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SU.convert(text, None, None)


def test_records_become_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    id = UUID("6c91e6eb-085c-11e6-a7a5-22000bf2d559")
    Output(is_json=True).json({"id": id, "path": Path("/a/b"), "at": datetime(2030, 1, 1)})
    told = json.loads(capsys.readouterr().out)
    assert told == {"id": str(id), "path": "/a/b", "at": "2030-01-01T00:00:00"}


def test_a_plain_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("alpha", 5, None), ("b", 1200, "x")]
    Output().table(["SITE", Column("TOKENS", numeric=True), "NOTE"], rows)
    assert capsys.readouterr().out.splitlines() == [
        "SITE   TOKENS  NOTE",
        "alpha       5",
        "b        1200  x",
    ]


def test_an_empty_table_says_so_beside_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(["SITE"], [], empty="No sites yet.")
    assert capsys.readouterr() == ("", "No sites yet.\n")


def test_a_terminal_gets_a_table_that_fits(tmp_path: object) -> None:
    code = (
        "from fabric.cli.output import *;"
        "Output().table([Column('ID', whole=True), 'TEXT'], [('i' * 20, 'word ' * 40)])"
    )
    master, slave = pty.openpty()
    environ = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=slave, env=environ, check=True)
    os.close(slave)
    lines = os.read(master, 65536).decode().splitlines()
    os.close(master)
    assert any("i" * 20 in line for line in lines)
    assert max(len(line.encode("ascii", "ignore")) for line in lines if "word" in line) <= 60


def test_records_of_all_kinds_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Record:
        at: datetime
        scopes: frozenset[str]
        price: Decimal
        candidate: Candidate

    candidate = Candidate(site="alpha", instance="inst_1", digest="d")
    at = datetime(2026, 1, 2, tzinfo=UTC)
    Output(is_json=True).json([Record(at, frozenset("ba"), Decimal("0.25"), candidate)])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["at"] == "2026-01-02T00:00:00+00:00"
    assert (told["scopes"], told["price"]) == (["a", "b"], "0.25")
    assert told["candidate"]["site"] == "alpha"


def test_facts_that_are_not_there_leave_no_gap() -> None:
    assert facts_line("a", None, "", "b") == "a · b"


def test_identifiers_are_shortened_but_names_are_not() -> None:
    assert short("inst_88f050b7804f4673") == "inst_88f050b7"
    assert short("beta") == "beta"
