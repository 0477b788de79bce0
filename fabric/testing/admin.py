"""``fabric-admin`` on one database, as an administrator runs it."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from fabric.cli.main import fabric_admin


class Admin:
    """Runs commands on one database.

    Args:
        url: The database.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def run(self, *args: str, stdin: str | None = None) -> Result:
        """Run a command, whatever comes of it."""
        return CliRunner().invoke(fabric_admin, [*args, "--database", self.url], input=stdin)

    def ok(self, *args: str, stdin: str | None = None) -> Result:
        """Run a command, which must succeed."""
        result = self.run(*args, stdin=stdin)
        assert result.exit_code == 0, f"{args}: {result.stderr}"
        return result

    def json(self, *args: str, stdin: str | None = None) -> Any:
        """Run a command, which must succeed, and return what it prints as JSON."""
        return json.loads(self.ok(*args, "--format", "json", stdin=stdin).stdout)
