"""Reads numbers of a model's configuration, which somebody else wrote."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.errors import ShapeInvalid

Config = Mapping[str, object]

_LARGEST = 10**9
"""No number of a configuration is larger; what is, is a mistake or an attack."""


class Reader:
    """Reads one configuration, and refuses what is missing or wrong in it.

    Args:
        name: What the model is called.
        config: The content of its ``config.json``.
    """

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        self._config = config

    def number(
        self, key: str, default: int | None = None, *, least: int = 1, also: str = ""
    ) -> int:
        """Return a whole number.

        Args:
            key: Its name.
            default: What it is if the configuration has no such key, or null.
            least: The least it may be.
            also: Another name of it.

        Raises:
            ShapeInvalid: There is none, or it is not a whole number in bounds.
        """
        values = (self._config.get(key), self._config.get(also), default)
        value = next((value for value in values if value is not None), None)
        if value is None:
            raise self.refuse(f"its configuration has no {also or key!r}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(f"{key!r} is {value!r}, not a whole number")
        if not least <= value <= _LARGEST:
            raise self.refuse(f"{key!r} is {value}, and must be from {least} to {_LARGEST}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value.

        Raises:
            ShapeInvalid: It is something else.
        """
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(f"{key!r} is {value!r}, not true or false")
        return value

    def numbers(self, key: str) -> frozenset[int]:
        """Return a list's whole numbers; none if there is no list.

        Raises:
            ShapeInvalid: It is something else.
        """
        value = self._config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.refuse(f"{key!r} is {value!r}, not a list of whole numbers")
        return frozenset(value)

    def refuse(self, reason: str) -> ShapeInvalid:
        """Return the error that says why the model cannot be counted."""
        return ShapeInvalid(model=self.name, reason=reason)
