"""A model is found in a folder, in a file or by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fabric.errors import ShapeInvalid, UnknownShape
from fabric.planning import KNOWN_MODELS, find_shape

CONFIG = json.dumps(dict(KNOWN_MODELS["SmolLM2-135M"]))


def test_a_folder_and_its_file_have_the_same_shape(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG)
    assert find_shape(str(folder)) == find_shape(str(folder / "config.json"))
    assert find_shape(str(folder)).name == "my-model"
    assert find_shape(str(folder)).parameters == 134_515_008


def test_a_name_is_looked_up_where_there_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shape("Llama-3-8B").parameters == 8_030_261_248
    with pytest.raises(UnknownShape, match="give a folder"):
        find_shape("./Llama-4-8B/weights")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "JSON object"),
        ('{"model_type": "llama"}', "no 'hidden_size'"),
        (CONFIG.replace("576", "NaN"), "'hidden_size' is nan"),
        (CONFIG + " " * 2**20, "over 1048576 bytes"),
        (b"\xff\xfe\xfa", "not JSON"),
    ],
    ids=["missing", "empty", "cut", "deep", "list", "bare", "nan", "long", "bytes"],
)
def test_a_bad_file_is_refused_by_its_path(
    tmp_path: Path, content: str | bytes | None, reason: str
) -> None:
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ShapeInvalid, match=reason):
        find_shape(str(tmp_path))
