"""Intervention programs: what is sent to the hub, and what comes back."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict

from fabric.sdk.results import Json
from fabric.sdk.stream import broken, read_replies

if TYPE_CHECKING:
    from fabric.messages import Program
    from fabric.sdk.arrays import Array
    from fabric.sdk.transport import Transport

PATH = "/v1/fabric/programs"
EMPTY: Mapping[str, Any] = MappingProxyType({})


class ProgramOptions(TypedDict, total=False):
    """What a program may carry besides its model.

    Attributes:
        tier: How urgent it is.
        deadline_s: Seconds from admission after which it is given up.
        sites: The only sites that may serve it.
        overflow: Whether it may leave instances of one's own, which keep it otherwise.
        data_site: The site where the program's data lives.
    """

    tier: Literal["interactive", "standard", "batch"] | None
    deadline_s: float | None
    sites: Sequence[str] | None
    overflow: bool | None
    data_site: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptToken:
    """A token of a prompt."""

    id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class StepSaves:
    """What a run saved in one step, as it arrives."""

    run: str
    step: int
    names: tuple[str, ...]
    data: bytes = field(repr=False)

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """The saves of the step, by name."""
        return self.read[0]

    @cached_property
    def read(self) -> tuple[dict[str, Array], dict[str, str]]:
        """The saves and the file's metadata."""
        from fabric.sdk.arrays import read_tensors

        return read_tensors(self.data)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run of a program gave.

    Attributes:
        id: The run's name in its program.
        names: Of its saves.
        data: Its saves as one safetensors file.
        tokens: The ids it generated.
        text: What they read as.
        finish_reason: Why it ended.
        steps: What was streamed, which is not in ``data``.
    """

    id: str
    names: tuple[str, ...] = ()
    data: bytes = field(default=b"", repr=False)
    steps: tuple[StepSaves, ...] = field(default=(), repr=False)
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """The saves by name; bfloat16 as float32."""
        return self._read[0]

    def positions(self, save: str) -> tuple[int, ...] | None:
        """Return the token positions along a save's first axis, if that axis has them."""
        found = self._read[1].get(f"positions:{save}")
        return None if found is None else tuple(json.loads(found))

    def __getitem__(self, save: str) -> Array:
        return self.arrays[save]

    @cached_property
    def _read(self) -> tuple[dict[str, Array], dict[str, str]]:
        from fabric.sdk.arrays import join, read_tensors

        arrays, metadata = read_tensors(self.data) if self.data else ({}, {})
        joined, positions = join([step.read for step in self.steps])
        return arrays | joined, metadata | positions


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramUsage:
    """What a program consumed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    hook_bytes_in: int = 0
    hook_bytes_out: int = 0
    device_s: float = 0.0

    @classmethod
    def from_reply(cls, usage: Json) -> Self:
        """Read the hub's ``usage``."""
        known = {name: usage[name] for name in cls.__slots__ if usage.get(name) is not None}
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramResult(Mapping[str, RunResult]):
    """What a whole program gave: its runs by name, and where they were computed.

    Attributes:
        site: Where; ``None`` in this process.
        digest: The digest of the model's tensors.
        charge_usu: What it cost, in micro-SU.
        total_s: Seconds from admission to the end.
        run_id: Its name in the hub's records.
    """

    runs: tuple[RunResult, ...]
    usage: ProgramUsage = ProgramUsage()
    model: str
    digest: str
    site: str | None = None
    charge_usu: int = 0
    total_s: float = 0.0
    run_id: str = ""

    @classmethod
    def from_reply(
        cls,
        reply: Json,
        files: Mapping[str, bytes] = EMPTY,
        steps: Mapping[str, Sequence[StepSaves]] = EMPTY,
    ) -> Self:
        """Read the hub's reply.

        Args:
            reply: JSON.
            files: What the hub kept, by the run it belongs to.
            steps: What was streamed, likewise.
        """
        ours = reply.get("fabric") or {}
        runs = (
            _read_run(run, files.get(run["id"]), steps.get(run["id"], ())) for run in reply["runs"]
        )
        return cls(
            runs=tuple(runs),
            usage=ProgramUsage.from_reply(reply.get("usage") or {}),
            model=ours.get("model") or reply["model"],
            digest=ours.get("digest", ""),
            site=ours.get("site"),
            charge_usu=ours.get("charge_usu", 0),
            total_s=ours.get("total_s") or 0.0,
            run_id=ours.get("run") or reply.get("id", ""),
        )

    def __getitem__(self, run: str) -> RunResult:
        for one in self.runs:
            if one.id == run:
                return one
        raise KeyError(run)

    def __iter__(self) -> Any:
        return (run.id for run in self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def summary(self) -> str:
        """Where, how long and for how much, on one line."""
        usage = self.usage
        facts = [
            self.site or "in this process",
            self.model,
            f"{len(self.runs)} run{'s' * (len(self.runs) != 1)}",
            f"{usage.prompt_tokens + usage.completion_tokens} tokens",
            f"{usage.hook_bytes_out:,} bytes saved",
            f"{self.total_s:.2f} s",
        ]
        if self.site:
            facts.append(f"{self.charge_usu / 1e6:.6f} SU")
        return " · ".join(facts)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(run.id)}</td><td>{escape(name)}</td>"
            f"<td>{escape(str(list(array.shape)))}</td><td>{array.dtype}</td></tr>"
            for run in self.runs
            for name, array in run.arrays.items()
        )
        head = "<tr><th>run</th><th>save</th><th>shape</th><th>dtype</th></tr>"
        return (
            f'<table>{head}{rows}</table><div style="opacity:.65;font-size:85%">'
            f"{escape(self.summary)}</div>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What a program would take at most, told before it runs.

    Attributes:
        digest: The digest of the model's tensors.
        num_flops: Floating point operations.
        result_bytes: Of its saves.
        hook_bytes_in: Of its constants.
        scopes: What the key must allow.
        charge_usu_max: The most it can cost, in micro-SU.
        device_s_max: The seconds of a device it is allowed.
    """

    model: str
    digest: str
    num_flops: int
    result_bytes: int
    hook_bytes_in: int
    num_prompt_tokens: int
    scopes: tuple[str, ...]
    charge_usu_max: int
    device_s_max: float

    @classmethod
    def from_reply(cls, reply: Json) -> Self:
        """Read the hub's quote."""
        known = {name: reply[name] for name in cls.__slots__ if name != "scopes"}
        return cls(**known, scopes=tuple(reply["scopes"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunToken:
    """A token that a run generated, as it arrives."""

    run: str
    token_id: int
    text: str


ProgramEvent: TypeAlias = StepSaves | RunToken
OnEvent: TypeAlias = Callable[[ProgramEvent], None]


def build_body(program: Program, model: str, options: ProgramOptions) -> dict[str, Any]:
    """Return the body to post.

    Raises:
        TypeError: An option has an unknown name.
    """
    if unknown := sorted(set(options) - set(ProgramOptions.__annotations__)):
        known = ", ".join(ProgramOptions.__annotations__)
        raise TypeError(f"{unknown[0]!r} is not an option of a program; there are {known}")
    given = {name: value for name, value in options.items() if value is not None}
    return {"model": model, "program": program.model_dump(mode="json"), **given}


async def run(
    transport: Transport,
    program: Program,
    model: str,
    on_event: OnEvent | None,
    options: ProgramOptions,
) -> ProgramResult:
    """Send a program, hear its events, and fetch what the hub kept of its results."""
    body = build_body(await _sendable(transport, program), model, options)
    deadline_s = options.get("deadline_s")
    if on_event is None and not streams(program):
        reply = await transport.post(PATH, body, deadline_s=deadline_s)
        return await _finish(transport, reply, {})
    steps: dict[str, list[StepSaves]] = {}
    last: Json | None = None
    response = await transport.open_stream(PATH, body | {"stream": True}, deadline_s=deadline_s)
    async with aclosing(read_replies(response)) as replies:
        async for reply in replies:
            if reply.get("object") == "program.result":
                last = reply
            elif event := await _read_event(transport, reply):
                if isinstance(event, StepSaves):
                    steps.setdefault(event.run, []).append(event)
                if on_event is not None:
                    on_event(event)
    if last is None:
        raise broken(sum(map(len, steps.values())), "it ended without a result")
    return await _finish(transport, last, steps)


async def quote(
    transport: Transport, program: Program, model: str, options: ProgramOptions
) -> Quote:
    """Ask what a program would take at most."""
    body = build_body(await _sendable(transport, program), model, options)
    return Quote.from_reply(await transport.post(PATH, body | {"quote": True}))


async def tokens(
    transport: Transport, prompt: str | Sequence[int], model: str
) -> tuple[PromptToken, ...]:
    """Have a prompt read by the model's tokenizer: a completion that only echoes."""
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else [int(id) for id in prompt],
        **{"max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0},
    }
    read = (await transport.post("/v1/completions", body))["choices"][0]["logprobs"]
    return tuple(
        PromptToken(id=id, text=text)
        for id, text in zip(read["token_ids"], read["tokens"], strict=True)
    )


async def _sendable(transport: Transport, program: Program) -> Program:
    """Return the program with constants that are too large for a request stored at the hub."""
    from fabric.messages.program import MAX_INLINE_BYTES

    consts = program.consts
    if consts is None or consts.data is None or consts.size <= MAX_INLINE_BYTES:
        return program
    kept = await transport.put_bytes("/v1/fabric/artifacts", b64decode(consts.data))
    handle = {"artifact": kept["id"]}
    stored = consts.model_copy(update={"data": None, "handle": handle})
    return program.model_copy(update={"consts": stored})


async def _read_event(transport: Transport, reply: Json) -> ProgramEvent | None:
    """Return one event of a stream; ``None`` of a kind that is not known."""
    match reply.get("object"):
        case "program.saves":
            handle = reply.get("handle")
            data = await _fetch(transport, handle) if handle else b64decode(reply["data"])
            return StepSaves(
                run=reply["run"], step=reply["step"], names=tuple(reply["names"]), data=data
            )
        case "program.token":
            return RunToken(run=reply["run"], token_id=reply["token_id"], text=reply["text"])
        case _:
            return None


async def _fetch(transport: Transport, handle: Json) -> bytes:
    return await transport.get_bytes(f"/v1/fabric/artifacts/{handle['id']}")


async def _finish(
    transport: Transport, reply: Json, steps: Mapping[str, list[StepSaves]]
) -> ProgramResult:
    files = {
        run["id"]: await _fetch(transport, run["handle"])
        for run in reply["runs"]
        if run.get("handle")
    }
    return ProgramResult.from_reply(reply, files, steps)


def streams(program: Program) -> bool:
    """Whether any run sends saves while it goes on."""
    return any(getattr(node, "stream", False) for run in program.runs for node in run.nodes)


def _read_run(run: Json, file: bytes | None, steps: Sequence[StepSaves]) -> RunResult:
    return RunResult(
        id=run["id"],
        names=tuple(run["names"]),
        data=file if file is not None else b64decode(run.get("data") or ""),
        steps=tuple(steps),
        tokens=tuple(run.get("tokens") or ()),
        text=run.get("text") or "",
        finish_reason=run.get("finish_reason"),
    )
