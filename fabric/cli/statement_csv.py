"""Statements for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from decimal import Decimal

from fabric.cli.money import USU_PER_SU
from fabric.cli.output import to_json

COLUMNS = (
    *("entry", "at", "kind", "allocation", "amount_su", "balance_su"),
    *("run", "site", "model", "mends", "memo"),
)


def to_csv(lines: Iterable[object]) -> str:
    """Return a statement's lines as CSV with a head line (RFC 4180, but LF); amounts in SU."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        fields = to_json(line)
        for name in ("amount", "balance"):
            fields[f"{name}_su"] = f"{Decimal(fields[f'{name}_usu']) / USU_PER_SU:.6f}"
        writer.writerow({name: _inert(value) for name, value in fields.items()})
    return text.getvalue()


def _inert(value: object) -> object:
    """Return a text so that no spreadsheet computes it.

    Source: OWASP, "CSV Injection".
    """
    is_number = isinstance(value, str) and value.lstrip("-").replace(".", "", 1).isdigit()
    if isinstance(value, str) and not is_number and value.startswith(tuple("=+-@\t\r")):
        return f"'{value}"
    return value
