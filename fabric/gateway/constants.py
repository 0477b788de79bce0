"""A program's constants, wherever they are, as one safetensors file of its own.

An engine is given constants alone: what a program takes from stored results is put beside them
here, after it was looked up as its project's.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fabric.artifacts import Artifacts
from fabric.errors import NotFound, ProgramInvalid, ProgramTooLarge
from fabric.messages import Program
from fabric.messages.nodes import Artifact, Const
from fabric.messages.program import MAX_CONSTS_BYTES, MAX_INLINE_BYTES, Constants
from fabric.programs import TensorSpec, read_constants, read_header

MAX_HEADER_BYTES = 4 * 2**20
_LENGTH_BYTES = 8

Entry = dict[str, object]
"""What a safetensors header says of a tensor."""


@dataclass(frozen=True, slots=True)
class Materials:
    """A program as an engine takes it, and the tensors among its constants."""

    program: Program
    specs: Mapping[str, TensorSpec]


async def gather(
    program: Program, project: str, artifacts: Artifacts | None, *, ttl_s: float
) -> Materials:
    """Return a program with all its tensors among its constants: inline, or above
    ``MAX_INLINE_BYTES`` under a handle, which is good for ``ttl_s`` seconds if it is made here.

    Raises:
        ProgramInvalid: The constants are not what they are said to be, or a stored result has no
            such save.
        ProgramTooLarge: They are too large together.
        NotFound: The project has no such artifact.
    """
    data = await _read(program, project, artifacts)
    specs = {} if data is None else await asyncio.to_thread(read_header, data)
    taken = await _take(program, project, artifacts)
    if taken:
        program, merged = await asyncio.to_thread(_merge, program, data, taken)
        data, specs = merged, read_header(merged)
    if data is None or (not taken and program.consts and program.consts.data is not None):
        return Materials(program, specs)
    stored = None if taken else program.consts
    constants = await _place(data, project, artifacts, stored, ttl_s)
    return Materials(program.model_copy(update={"consts": constants}), specs)


async def _read(program: Program, project: str, artifacts: Artifacts | None) -> bytes | None:
    constants = program.consts
    if constants is None:
        return None
    if constants.data is not None:
        if constants.size > MAX_INLINE_BYTES:
            raise ProgramTooLarge(
                cap="inline constants, in bytes (upload larger ones as an artifact),",
                value=constants.size,
                limit=MAX_INLINE_BYTES,
            )
        return await asyncio.to_thread(read_constants, program)
    match constants.handle:
        case {"artifact": str(name), **rest} if not rest and artifacts is not None:
            record = await artifacts.get(name, project=project)
        case _:
            raise ProgramInvalid(reason='the handle of its constants is not {"artifact": ID}')
    if (record.sha256, record.num_bytes) != (constants.sha256, constants.size):
        reason = (
            f"the artifact {record.id} has {record.num_bytes} bytes and the sha256"
            f" {record.sha256}, and it declares {constants.size} and {constants.sha256}"
        )
        raise ProgramInvalid(reason=reason)
    return await artifacts.read(record.id, project=project)


async def _place(
    data: bytes, project: str, artifacts: Artifacts | None, stored: Constants | None, ttl_s: float
) -> Constants:
    """Return constants inline, or by a handle that an instance can follow: the one they are
    ``stored`` under already, if they are."""
    digest, size = hashlib.sha256(data).hexdigest(), len(data)
    if size <= MAX_INLINE_BYTES:
        text = base64.b64encode(data).decode()
        return Constants(sha256=digest, size=size, data=text)
    if stored is not None:
        return stored
    assert artifacts is not None
    record = await artifacts.keep(project, _pieces(data), ttl_s=ttl_s)
    return Constants(sha256=digest, size=size, handle={"artifact": record.id})


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


# ---- what is taken from stored results -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Taken:
    entry: Entry
    data: bytes


async def _take(
    program: Program, project: str, artifacts: Artifacts | None
) -> dict[tuple[str, str, str], _Taken]:
    nodes = {
        (node.id, node.run, node.save): (run.id, index)
        for run in program.runs
        for index, node in enumerate(run.nodes)
        if isinstance(node, Artifact)
    }
    taken: dict[tuple[str, str, str], _Taken] = {}
    left = MAX_CONSTS_BYTES - (0 if program.consts is None else program.consts.size)
    for key, (run, index) in nodes.items():
        artifact_id, part, save = key
        if artifacts is None:
            raise NotFound(kind="artifact", name=artifact_id)
        record = await artifacts.get(artifact_id, project=project)
        if record.part not in (None, part):
            reason = f"the artifact {artifact_id} is of the run {record.part!r}, not {part!r}"
            raise ProgramInvalid(reason=reason, run=run, node=index)
        try:
            taken[key] = await asyncio.to_thread(pick, artifacts.path(record), save, left)
        except FileNotFoundError:
            raise NotFound(kind="artifact", name=artifact_id) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            reason = f"the artifact {artifact_id} has no tensor {save!r}"
            raise ProgramInvalid(reason=reason, run=run, node=index) from None
        left -= len(taken[key].data)
    return taken


def pick(path: Path, name: str, limit_bytes: int) -> _Taken:
    """Return one tensor of a safetensors file that nobody has looked at.

    Raises:
        ProgramTooLarge: The tensor has more bytes than allowed.
        ValueError, KeyError, TypeError, AttributeError, RecursionError: There is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("a header that is too long")
        entry = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= path.stat().st_size:
            raise ValueError("offsets that lie outside of the file")
        size = end - begin
        if size > limit_bytes:
            raise _too_large(MAX_CONSTS_BYTES - limit_bytes + size)
        file.seek(_LENGTH_BYTES + length + begin)
        data = file.read(size)
    # Whether shape and type fit the bytes is seen when the merged file's header is read.
    return _Taken({"dtype": entry["dtype"], "shape": entry["shape"]}, data)


def _too_large(size: int) -> ProgramTooLarge:
    return ProgramTooLarge(
        cap="constants and artifacts, in bytes,", value=size, limit=MAX_CONSTS_BYTES
    )


def _merge(
    program: Program, data: bytes | None, taken: Mapping[tuple[str, str, str], _Taken]
) -> tuple[Program, bytes]:
    """Return the program with its artifacts as constants, and the constants."""
    tensors = [] if data is None else list(_tensors(data))
    names = {key: f"artifact.{index}" for index, key in enumerate(taken)}
    if clash := {name for name, _ in tensors} & set(names.values()):
        reason = f"the name {min(clash)!r} is kept for artifacts; call the constant something else"
        raise ProgramInvalid(reason=reason)
    tensors += [(names[key], one) for key, one in taken.items()]
    header: dict[str, Entry] = {}
    end = 0
    for name, one in tensors:
        begin, end = end, end + len(one.data)
        header[name] = {**one.entry, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    parts = [len(head).to_bytes(_LENGTH_BYTES, "little"), head, *(one.data for _, one in tensors)]
    merged = b"".join(parts)
    if len(merged) > MAX_CONSTS_BYTES:
        raise _too_large(len(merged))
    runs = tuple(
        run.model_copy(
            update={
                "nodes": tuple(
                    Const(name=names[node.id, node.run, node.save])
                    if isinstance(node, Artifact)
                    else node
                    for node in run.nodes
                )
            }
        )
        for run in program.runs
    )
    return program.model_copy(update={"runs": runs}), merged


def _tensors(data: bytes) -> list[tuple[str, _Taken]]:
    """Return the tensors of constants whose header has been found to be true, in order."""
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(data[_LENGTH_BYTES:start])
    header.pop("__metadata__", None)
    found = sorted(header.items(), key=lambda one: one[1]["data_offsets"])
    return [
        (
            name,
            _Taken(
                {"dtype": entry["dtype"], "shape": entry["shape"]},
                data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            ),
        )
        for name, entry in found
    ]
