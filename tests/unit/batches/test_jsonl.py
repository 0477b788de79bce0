"""Lines of an input file are found where they are."""

import json
from pathlib import Path

from fabric.batches import BatchSettings
from fabric.batches.jsonl import MAX_FINDINGS, parse, scan

ENDPOINT = "/v1/completions"


def line(custom_id: str, **body: object) -> bytes:
    asked = {"model": "m", **body}
    fields = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": asked}
    return json.dumps(fields, ensure_ascii=False).encode()


def test_each_line_can_be_read_again_by_its_place(tmp_path: Path) -> None:
    lines = [line("a"), line("ü", prompt="Ångström"), line("c"), line("d")]
    path = tmp_path / "input"
    path.write_bytes(lines[0] + b"\r\n\n   \n" + lines[1] + b"\n" + lines[2] + b"\r\n" + lines[3])
    found = scan(path, ENDPOINT, BatchSettings())
    assert (found.errors, found.model) == ([], "m")
    assert [one.number for one in found.lines] == [1, 4, 5, 6]
    content = path.read_bytes()
    for one, expected in zip(found.lines, lines, strict=True):
        raw = content[one.offset_bytes : one.offset_bytes + one.num_bytes]
        assert raw == expected
        assert parse(raw)["custom_id"] == one.custom_id


def test_a_line_that_is_too_long_does_not_move_the_others(tmp_path: Path) -> None:
    settings = BatchSettings(line_bytes=200)
    exact = line("b", pad="x" * (200 - len(line("b", pad=""))))
    path = tmp_path / "input"
    path.write_bytes(line("a", pad="x" * 10_000) + b"\n" + exact + b"\r\n" + line("c"))
    found = scan(path, ENDPOINT, settings)
    assert [(error["code"], error["line"]) for error in found.errors] == [("line_too_long", 1)]
    assert [(one.number, one.custom_id) for one in found.lines] == [(2, "b"), (3, "c")]
    assert found.lines[0].num_bytes == 200


def test_not_every_mistake_of_a_wrong_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"no json\n" * 1000)
    found = scan(path, ENDPOINT, BatchSettings())
    assert len(found.errors) == MAX_FINDINGS
