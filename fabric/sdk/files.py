"""Programs and their results as files."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fabric.errors import ProgramInvalid, RequestInvalid
from fabric.messages import Program
from fabric.messages.program import MAX_CONSTS_BYTES
from fabric.sdk.arrays import write_tensors
from fabric.sdk.programs import ProgramResult


def write_program(path: str | Path, program: Program, model: str | None = None) -> None:
    """Write a program as JSON, with its constants inline: ``fabric trace run`` reads it."""
    body: dict[str, Any] = {} if model is None else {"model": model}
    body["program"] = program.model_dump(mode="json")
    Path(path).write_text(json.dumps(body), encoding="utf-8")


def read_program(
    path: str | Path, constants: str | Path | None = None
) -> tuple[Program, str | None]:
    """Return a program and the model it names, if it names one.

    Args:
        path: JSON: a program, or ``{"model": …, "program": …}``.
        constants: Its safetensors file, if they are not inline.

    Raises:
        RequestInvalid: A file is not there, or is not what it should be.
        ProgramInvalid: It is no program.
    """
    try:
        body = json.loads(_read(path, "file"))
    except ValueError as error:
        raise RequestInvalid(param="file", value=str(path), reason=f"no JSON: {error}") from None
    model = None
    if isinstance(body, dict) and "program" in body:
        model, body = body.get("model"), body["program"]
    if constants is not None and isinstance(body, dict):
        data = _read(constants, "constants")
        body["consts"] = {
            "sha256": sha256(data).hexdigest(),
            "size": len(data),
            "data": b64encode(data).decode(),
        }
    try:
        return Program.model_validate(body), model
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProgramInvalid(reason=f"{where}: {first['msg']}") from None


def write_result(path: str | Path, result: ProgramResult) -> None:
    """Write what all runs saved as one safetensors file: ``run/save``, bfloat16 as float32."""
    arrays = {
        f"{run.id}/{name}": array for run in result.runs for name, array in run.arrays.items()
    }
    about = {
        "model": result.model,
        "digest": result.digest,
        "site": result.site or "",
        "run": result.run_id,
    }
    Path(path).write_bytes(write_tensors(arrays, about))


def _read(path: str | Path, param: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RequestInvalid(param=param, value=str(path), reason=reason) from None
    if len(data) > 2 * MAX_CONSTS_BYTES:
        raise RequestInvalid(param=param, value=str(path), reason=f"it has {len(data)} bytes")
    return data
