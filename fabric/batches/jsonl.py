"""Reading the input of a batch: one request a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from fabric.batches.records import BatchSettings, Json, Line

MAX_FINDINGS = 100
"""Of more mistakes than that, the rest is not told."""
MAX_ID_CHARS = 512


@dataclass(slots=True)
class Scan:
    """What was found: the lines, the one model they ask, and what is wrong with them."""

    lines: list[Line] = field(default_factory=list)
    model: str | None = None
    errors: list[Json] = field(default_factory=list)

    def note(self, code: str, message: str, *, line: int | None, param: str | None = None) -> None:
        """Add a mistake, in OpenAI's shape."""
        if len(self.errors) < MAX_FINDINGS:
            self.errors.append({"code": code, "message": message, "line": line, "param": param})


def parse(raw: bytes) -> Json:
    """Return the JSON object of one line.

    Raises:
        ValueError: It is none; the message says why.
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} of the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__} where an object belongs")
    return value


def scan(path: Path, endpoint: str, settings: BatchSettings) -> Scan:
    """Read an input file and check all but the requests' own parameters."""
    found, ids = Scan(), set[str]()
    with path.open("rb") as file:
        for number, offset_bytes, raw in _lines(file, settings.line_bytes):
            if len(found.lines) >= settings.num_lines:
                message = f"A batch has at most {settings.num_lines} lines; split the file."
                found.note("too_many_lines", message, line=number)
                break
            if len(raw) > settings.line_bytes:
                message = f"The line is longer than {settings.line_bytes} bytes."
                found.note("line_too_long", message, line=number)
            elif raw.strip():
                custom_id = _check(raw, number, endpoint, found)
                if custom_id in ids:
                    message = f"The custom_id {custom_id!r} is that of an earlier line too."
                    found.note("duplicate_custom_id", message, line=number, param="custom_id")
                ids.add(custom_id)
                found.lines.append(
                    Line(
                        number=number,
                        custom_id=custom_id,
                        offset_bytes=offset_bytes,
                        num_bytes=len(raw),
                    )
                )
    if not found.lines and not found.errors:
        found.note("empty_file", "The file has no lines; write one request a line.", line=None)
    return found


def _check(raw: bytes, number: int, endpoint: str, found: Scan) -> str:
    """Note what is wrong with a line, and return its ``custom_id``."""
    try:
        line = parse(raw)
    except ValueError as error:
        found.note("invalid_json_line", f"The line is not a JSON object: {error}.", line=number)
        return f"line {number}"
    body, custom_id = line.get("body"), line.get("custom_id")
    if unknown := sorted(set(line) - {"custom_id", "method", "url", "body"}):
        message = f"A line has no {unknown[0]!r}; it has custom_id, method, url and body."
        found.note("unknown_parameter", message, line=number, param=unknown[0])
    if line.get("method") != "POST":
        found.note("invalid_method", "The method should be POST.", line=number, param="method")
    if line.get("url") != endpoint:
        message = f"The url should be {endpoint!r}, the batch's endpoint."
        found.note("invalid_url", message, line=number, param="url")
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, str):
        message = "The body should be an object that names its model."
        found.note("invalid_body", message, line=number, param="body.model")
    elif found.model not in (None, model):
        message = f"A batch asks one model, and the lines before ask {found.model!r}."
        found.note("mismatched_model", message, line=number, param="body.model")
    else:
        found.model = model
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        message = f"The custom_id should be a text of 1 to {MAX_ID_CHARS} characters."
        found.note("invalid_custom_id", message, line=number, param="custom_id")
        return f"line {number}"
    return custom_id


def _lines(file: BinaryIO, limit_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and bytes of each line; of one over the limit only its beginning."""
    number = offset_bytes = 0
    while raw := file.readline(limit_bytes + 2):
        number += 1
        yield number, offset_bytes, raw.removesuffix(b"\n").removesuffix(b"\r")
        while not raw.endswith(b"\n") and (rest := file.readline(limit_bytes)):
            raw = rest
        offset_bytes = file.tell()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
