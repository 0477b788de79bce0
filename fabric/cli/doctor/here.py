"""This machine: its Python, its packages, its disk."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fabric.cli.doctor.check import Finding

NEEDED_BYTES = 2**30
"""Logs, results and a database grow; below this they soon cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagesCheck:
    """Are Python and the packages of an extra of those versions that this release asks for?"""

    extra: str
    distribution: str = "fabric-inference"
    name: str = "packages"

    def run(self) -> Iterator[Finding]:
        """Compare what is installed with the distribution's own metadata."""
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        about = metadata.metadata(self.distribution)
        python = SpecifierSet(about["Requires-Python"] or "")
        if not python.contains(platform.python_version()):
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"Python is {platform.python_version()}, and {python} is needed",
                remedy="install the release into an environment of such a Python",
            )
        needed = [Requirement(text) for text in metadata.requires(self.distribution) or ()]
        unmet = [
            problem
            for one in needed
            if one.marker is None or one.marker.evaluate({"extra": self.extra})
            for problem in [_problem(one.name, one.specifier)]
            if problem
        ]
        if unmet:
            yield Finding(
                check=self.name,
                level="wrong",
                detail="; ".join(unmet),
                remedy=f"pip install --upgrade '{self.distribution}[{self.extra}]'",
            )
            return
        yield Finding(
            check=self.name,
            level="ok",
            detail=f"{self.distribution}[{self.extra}] {about['Version']}"
            f" on Python {platform.python_version()}",
        )


def _problem(name: str, specifier: object) -> str:
    from packaging.specifiers import SpecifierSet

    assert isinstance(specifier, SpecifierSet)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    if specifier.contains(version, prereleases=True):
        return ""
    return f"{name} is {version}, and {specifier} is needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCheck:
    """Is there room where files are written?

    Args:
        path: The directory; where it is not there yet, the nearest that is counts.
        needed_bytes: Less than this is wrong, less than ten times as much a warning.
    """

    path: Path
    needed_bytes: int = NEEDED_BYTES
    name: str = "disk"

    def run(self) -> Iterator[Finding]:
        """Ask the file system."""
        here = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        free_bytes = shutil.disk_usage(here).free
        told = f"{free_bytes / 2**30:.1f} GiB are free at {self.path}"
        if free_bytes >= 10 * self.needed_bytes:
            yield Finding(check=self.name, level="ok", detail=told)
            return
        yield Finding(
            check=self.name,
            level="wrong" if free_bytes < self.needed_bytes else "warning",
            detail=f"{told}, and {self.needed_bytes / 2**30:.1f} GiB are the least",
            remedy=f"remove what is not needed there (`du -xsh {here}/*`), or set state_dir"
            " to a larger file system",
        )
