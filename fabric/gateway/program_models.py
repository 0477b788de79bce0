"""What clients send to have an intervention program run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fabric.errors import ProgramTooLarge
from fabric.messages import EMBED_SAMPLING, ModelRef, Program, ProgramInput, Request
from fabric.messages.nodes import Save
from fabric.messages.request import SiteName
from fabric.messages.session import MAX_FRAME_BYTES
from fabric.messages.wire import Wire

ENVELOPE_BYTES = 64 * 2**10
"""What a session's frame has around a program."""


class ProgramBody(Wire):
    """``POST /v1/fabric/programs``: a program, and how it is placed; see ``Request``."""

    model: ModelRef
    program: Program
    tier: Literal["interactive", "standard", "batch"] = "standard"
    policy: Literal["balanced", "fastest", "cheapest", "local-only"] = "balanced"
    deadline_s: float = Field(default=300.0, gt=0.0, le=86_400.0)
    sites: tuple[SiteName, ...] | None = None
    overflow: bool = False
    data_site: SiteName | None = None
    data_bytes: int = Field(default=0, ge=0)
    stream: bool = False
    quote: bool = False

    @model_validator(mode="after")
    def _data_has_a_home(self) -> Self:
        if self.policy == "local-only" and self.data_site is None:
            raise PydanticCustomError(
                "param",
                "the policy 'local-only' needs it: the site the data may not leave",
                {"param": "data_site"},
            )
        return self

    def to_request(self) -> Request:
        """Return what is asked. Nothing is streamed to a client that did not ask for it."""
        program = self.program if self.stream else _unstreamed(self.program)
        fields = self.model_dump(exclude={"program", "quote"})
        return Request(
            mode="program",
            input=ProgramInput(program=program),
            sampling=EMBED_SAMPLING,
            **fields,
        )


def check_frame(request: Request) -> None:
    """Refuse a request that no session could carry.

    Raises:
        ProgramTooLarge: Its JSON is longer than a frame.
    """
    limit = MAX_FRAME_BYTES - ENVELOPE_BYTES
    if (size := len(request.model_dump_json())) > limit:
        raise ProgramTooLarge(cap="JSON with all defaults, in bytes,", value=size, limit=limit)


def _unstreamed(program: Program) -> Program:
    runs = tuple(
        run.model_copy(
            update={
                "nodes": tuple(
                    node.model_copy(update={"stream": False}) if isinstance(node, Save) else node
                    for node in run.nodes
                )
            }
        )
        for run in program.runs
    )
    return program.model_copy(update={"runs": runs})
