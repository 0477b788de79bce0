"""The site's own file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fabric.cli.admin.site_files import inspect_file
from fabric.cli.doctor.check import Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigurationCheck:
    """Does the file follow the schema and the machine's limits, and can its endpoint be made?"""

    path: Path
    name: str = "configuration"

    def run(self) -> Iterator[Finding]:
        """Read it."""
        report = inspect_file(self.path.stem, self.path)
        for each in report.problems:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{each.field} is {each.value!r}: {each.reason}"[:400],
                remedy=f"change it in {self.path}",
            )
        if not report.problems:
            detail = f"{self.path} can be used"
            yield Finding(check=self.name, level="ok", detail=detail)
