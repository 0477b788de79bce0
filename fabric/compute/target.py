"""Where tasks go: an endpoint and the configuration of its user endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Union
from uuid import UUID

JSON = Union[None, bool, int, float, str, Sequence["JSON"], Mapping[str, "JSON"]]  # noqa: UP007


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeTarget:
    """An endpoint, and the options its template is rendered with.

    The service starts one user endpoint, with batch jobs of its own, for each different
    configuration: two that are equal as JSON are one target.

    Raises:
        TypeError: ``config`` is not JSON.
    """

    endpoint_id: UUID
    config: Mapping[str, JSON] = field(default_factory=dict, hash=False, compare=False)
    _key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        key = to_json(dict(self.config), sort_keys=True)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "config", json.loads(key))


def to_json(value: object, *, sort_keys: bool = False) -> str:
    """Return ``value`` as JSON text.

    Raises:
        TypeError: It is not JSON.
    """
    try:
        return json.dumps(value, allow_nan=False, sort_keys=sort_keys)
    except ValueError as error:
        raise TypeError(f"not JSON: {error}") from error


def measure_payload(args: tuple[JSON, ...]) -> int:
    """Return the bytes a task's arguments take in a submit, where they travel as a JSON string.

    Raises:
        TypeError: They are not JSON.
    """
    text = to_json(args)
    # Quotes and backslashes are escaped once more, everything else is plain ASCII by now.
    return len(text) + text.count('"') + text.count("\\") + 64
