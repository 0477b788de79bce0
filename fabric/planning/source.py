"""Finds the shape of the model that somebody names: a folder's, a file's, or a well-known one."""

from __future__ import annotations

import json
from pathlib import Path

from fabric.errors import ShapeInvalid
from fabric.planning.families import shape_of
from fabric.planning.known_models import known_shape
from fabric.planning.model_shape import ModelShape

_CONFIG_LIMIT_BYTES = 2**20


def find_shape(model: str) -> ModelShape:
    """Return a model's shape.

    Args:
        model: A folder with a ``config.json``, such a file, or a well-known model's name.

    Raises:
        ShapeInvalid: The configuration cannot be read or counted.
        UnknownShape: There is no such folder, and no well-known model is called that.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _read(model, path / "config.json")
    if path.is_file() or path.suffix == ".json":
        return _read(model, path)
    return known_shape(model)


def _read(model: str, path: Path) -> ModelShape:
    try:
        with path.open("rb") as file:
            raw = file.read(_CONFIG_LIMIT_BYTES + 1)
    except OSError as error:
        raise ShapeInvalid(
            model=model, reason=f"{path} cannot be read ({error.strerror})"
        ) from error
    if len(raw) > _CONFIG_LIMIT_BYTES:
        raise ShapeInvalid(model=model, reason=f"{path} has over {_CONFIG_LIMIT_BYTES} bytes")
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ShapeInvalid(model=model, reason=f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ShapeInvalid(model=model, reason=f"{path} does not hold a JSON object")
    named = path.resolve()
    name = named.parent.name if named.name == "config.json" else named.stem
    return shape_of(name, config)
