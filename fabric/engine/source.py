"""Where a model's files are. Free of torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fabric.errors import ModelNotLoadable


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A place to load a model and its tokenizer from.

    Args:
        kind: ``package``: the one ``.gguf``, or the one transformers directory, inside an installed
            Python package; ``gguf``: a GGUF
            file; ``directory``: a transformers directory (config.json, safetensors, tokenizer).
        location: The package's name, or the path.
    """

    kind: Literal["package", "gguf", "directory"]
    location: str

    @staticmethod
    def parse(text: str) -> ModelSource:
        """Return the source that ``package:<name>``, ``gguf:<file>`` or a path stands for.

        A path that ends in ``.gguf`` is a GGUF file, any other a transformers directory.

        Raises:
            ModelNotLoadable: The text is empty.
        """
        scheme, _, rest = text.partition(":")
        if scheme in ("package", "gguf") and rest:
            return ModelSource(kind=scheme, location=rest)  # type: ignore[arg-type]
        if not text or scheme in ("package", "gguf"):
            raise ModelNotLoadable(
                model=text, reason="a source is package:<name>, gguf:<file> or a directory's path"
            )
        return ModelSource(kind="gguf" if text.endswith(".gguf") else "directory", location=text)

    def __str__(self) -> str:
        return self.location if self.kind == "directory" else f"{self.kind}:{self.location}"

    def resolve(self) -> Path:
        """Return the GGUF file or the directory, which exists.

        Raises:
            ModelNotLoadable: There is no such package, file or directory, or the package holds
                no model or several.
        """
        if self.kind == "package":
            return self._find_in_package()
        path = Path(self.location).expanduser()
        if self.kind == "gguf" and not path.is_file():
            raise ModelNotLoadable(model=str(self), reason=f"there is no file {path}")
        if self.kind == "directory" and not (path / "config.json").is_file():
            raise ModelNotLoadable(model=str(self), reason=f"there is no {path / 'config.json'}")
        return path

    @property
    def embeds_sentences(self) -> bool:
        """Whether it is a sentence-embedding model: a directory of sentence-transformers' form.

        Raises:
            ModelNotLoadable: There is no such model.
        """
        return is_sentence_model(self.resolve())

    def _find_in_package(self) -> Path:
        # The package is found, not imported: its own imports need not be installed here.
        try:
            spec = importlib.util.find_spec(self.location)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelNotLoadable(
                model=str(self), reason=f"the Python package {self.location!r} is not installed"
            )
        roots = [Path(root) for root in spec.submodule_search_locations]
        models = sorted(file for root in roots for file in root.rglob("*.gguf"))
        models += sorted(
            file.parent
            for root in roots
            for file in root.rglob("config.json")
            if any(file.parent.glob("*.safetensors"))
        )
        if len(models) != 1:
            found = ", ".join(path.name for path in models) or "none"
            raise ModelNotLoadable(
                model=str(self),
                reason="the package should hold one .gguf file, or one directory with config.json"
                f" and safetensors, and holds {found}",
            )
        return models[0]


def is_sentence_model(path: Path) -> bool:
    """Say whether a directory has sentence-transformers' form."""
    return (path / "modules.json").is_file()
