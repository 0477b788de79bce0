"""The part of a request that is ours."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from fabric.gateway.openai_fields import Body
from fabric.gateway.response_format import as_text, read_constraint
from fabric.messages import Choices, Constraint, JsonSchema, Regex


class PlacementOptions(Body):
    """Where a request may run and how it is placed; see ``fabric.messages.Request``."""

    data_site: str | None = None
    data_bytes: int | None = None
    sites: tuple[str, ...] | None = None
    overflow: bool | None = None
    deadline_s: float | None = None
    policy: str | None = None
    weights: dict[str, float] | None = None
    tier: str | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def _data_has_a_home(self) -> Self:
        if self.policy == "local-only" and self.data_site is None:
            raise PydanticCustomError(
                "param",
                "the policy 'local-only' needs it: the site the data may not leave",
                {"param": "data_site"},
            )
        return self

    def to_fields(self) -> dict[str, object]:
        """Return what has a name of its own in ``fabric.messages.Request``."""
        return self.model_dump(exclude_none=True)


class FabricOptions(PlacementOptions):
    """The one object of a request that is ours.

    One of ``json_schema``, ``regex`` and ``choices`` may say what the answer must be.
    """

    json_schema: dict[str, object] | None = None
    regex: str | None = None
    choices: tuple[str, ...] | None = None

    def to_constraints(self) -> dict[str, Constraint]:
        """Return what the answer must be, by the parameter that says so.

        Raises:
            RequestInvalid: It is empty or too large.
        """
        found: dict[str, Constraint] = {}
        if self.json_schema is not None:
            param, text = "fabric.json_schema", as_text(self.json_schema)
            found[param] = read_constraint(param, JsonSchema, definition=text)
        if self.regex is not None:
            param = "fabric.regex"
            found[param] = read_constraint(param, Regex, pattern=self.regex)
        if self.choices is not None:
            param = "fabric.choices"
            found[param] = read_constraint(param, Choices, texts=self.choices)
        return found

    def to_fields(self) -> dict[str, object]:
        """Return what has a name of its own in ``fabric.messages.Request``."""
        constraints = {"json_schema", "regex", "choices"}
        return self.model_dump(exclude_none=True, exclude=constraints)
