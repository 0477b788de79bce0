"""The weights that a site's file names: are they there, whole, and those of the version?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fabric.cli.doctor.check import Finding
from fabric.config import SiteModel
from fabric.errors import DigestMismatch, ModelNotLoadable


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsCheck:
    """Are a model's files there and whole? Only when read in full are their bytes looked at.

    Args:
        model: As the site's file has it.
        digest: What the hub knows the version by; ``None`` if nobody has reported it.
        in_full: Read every tensor, which takes the model's memory and a while.
    """

    model: SiteModel
    digest: str | None = None
    in_full: bool = False

    @property
    def name(self) -> str:
        """The model's version."""
        return f"weights of {self.model.name}@{self.model.revision}"

    def run(self) -> Iterator[Finding]:
        """Look at the files where the source leads."""
        from fabric.engine.source import ModelSource

        try:
            path = ModelSource.parse(self.model.source).resolve()
            damaged = [] if path.is_file() else list(get_damages(path))
            if not damaged and self.in_full:
                yield self._compare(self._read())
                return
        except ModelNotLoadable as error:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=error.message.rstrip("."),
                remedy="put the files there, or change `source` in the site's file",
            )
            return
        except DigestMismatch as error:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=error.message,
                remedy=f"fetch the version's files again to {path}, or give these weights a"
                " revision of their own (`fabric-admin model add`)",
            )
            return
        if damaged:
            yield Finding(
                check=self.name,
                level="wrong",
                detail="; ".join(damaged),
                remedy=f"fetch these files again to {path}",
            )
            return
        detail = f"{path}: the files are there and whole; --weights reads them"
        yield Finding(check=self.name, level="ok", detail=detail)

    def _read(self) -> str:
        """Return the digest of the tensors, in the form in which the site computes them."""
        from fabric.engine.config import EngineConfig
        from fabric.engine.model import load_model
        from fabric.engine.source import ModelSource

        default, options = EngineConfig(), self.model.options
        source = ModelSource.parse(self.model.source)
        return load_model(
            source,
            name=self.model.name,
            dtype=options.dtype or default.dtype,
            weights=options.weights or default.weights,
            expected_digest=self.digest,
            headless=source.embeds_sentences,
        ).digest

    def _compare(self, digest: str) -> Finding:
        known = "is the version's" if self.digest else "is new: the hub has none yet"
        return Finding(check=self.name, level="ok", detail=f"{digest[:19]} {known}")


def get_damages(folder: Path) -> Iterator[str]:
    """Return what is missing or cut short among the safetensors files of a model.

    A file says in its header how long it is.
    """
    index = folder / "model.safetensors.index.json"
    named: Mapping[str, str] = {}
    if index.is_file():
        try:
            named = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            yield f"{index.name} is not an index of weights"
    files = {folder / name for name in named.values()} | set(folder.glob("*.safetensors"))
    if not files:
        yield f"{folder} has no *.safetensors"
    for file in sorted(files):
        if not file.is_file():
            yield f"{file.name} is missing"
        elif reason := _get_damage(file):
            yield f"{file.name} {reason}"


def _get_damage(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            return ""
    except (SafetensorError, OSError) as error:
        return f"is damaged ({error})"
