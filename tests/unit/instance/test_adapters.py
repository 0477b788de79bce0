"""Adapters come from the hub once; what lies on the disk is believed by its digest alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from fabric.errors import AdapterUnavailable
from fabric.instance.adapters import AdapterFiles
from fabric.payloads.lora import digest_of
from fabric.testing.hub import MODEL, running_hub
from fabric.testing.lora import peft_config, peft_weights


@dataclass(frozen=True)
class Source:
    """A hub with adapters."""

    session_url: str
    token: str
    digests: tuple[str, ...]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=("alpha",)) as hub:
        headers = {"authorization": f"Bearer {hub.api_key}"}
        digests = []
        for i in range(3):
            files = {"config": ("c", peft_config()), "weights": ("w", peft_weights(start=i))}
            reply = httpx.post(
                f"{hub.base_url}/v1/fabric/adapters",
                data={"name": f"a{i}", "model": MODEL},
                files=files,
                headers=headers,
            )
            digests.append(reply.json()["digest"])
        _, token = hub.catalog.add_launch("alpha", MODEL)
        yield Source(session_url=hub.session_url, token=token, digests=tuple(digests))


def kept(directory: Path) -> set[str]:
    return {path.name.replace("-", ":") for path in directory.iterdir()}


def test_an_adapter_is_fetched_once_and_then_read_from_the_disk(
    source: Source, tmp_path: Path
) -> None:
    (digest, *_) = source.digests
    data = AdapterFiles(source.session_url, source.token, tmp_path / "kept")(digest)
    assert digest_of(data) == digest
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    away = AdapterFiles("ws://127.0.0.1:9/v1/fabric/session", source.token, tmp_path / "kept")
    assert away(digest) == data
    with pytest.raises(AdapterUnavailable, match="ConnectError"):
        away(source.digests[1])


def test_a_damaged_file_is_fetched_again(source: Source, tmp_path: Path) -> None:
    (digest, *_) = source.digests
    files = AdapterFiles(source.session_url, source.token, tmp_path)
    data = files(digest)
    (path,) = tmp_path.iterdir()
    for damage in (data[:-1], b"", data[:100] + b"!" + data[101:]):
        path.write_bytes(damage)
        assert files(digest) == data
        assert path.read_bytes() == data


def test_what_the_hub_does_not_give_is_unavailable(source: Source, tmp_path: Path) -> None:
    unknown = "blake3:" + "0" * 64
    with pytest.raises(AdapterUnavailable, match="404") as caught:
        AdapterFiles(source.session_url, source.token, tmp_path)(unknown)
    assert caught.value.detail["digest"] == unknown
    assert caught.value.retryable
    with pytest.raises(AdapterUnavailable, match="401"):
        AdapterFiles(source.session_url, "no-token", tmp_path)(source.digests[0])
    assert kept(tmp_path) == set()


def test_the_disk_keeps_what_was_read_last(source: Source, tmp_path: Path) -> None:
    size = len(AdapterFiles(source.session_url, source.token, tmp_path / "x")(source.digests[0]))
    files = AdapterFiles(source.session_url, source.token, tmp_path / "kept", cache_bytes=2 * size)
    for at, digest in enumerate(source.digests[:2]):
        files(digest)
        path = tmp_path / "kept" / digest.replace(":", "-")
        os.utime(path, (at, at))
    files(source.digests[0])  # read again, so it is not the oldest any more
    files(source.digests[2])
    assert kept(tmp_path / "kept") == {source.digests[0], source.digests[2]}


def test_an_adapter_is_served_from_memory_where_the_disk_cannot_be_written(
    source: Source, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_bytes(b"")
    files = AdapterFiles(source.session_url, source.token, blocked)
    assert digest_of(files(source.digests[0])) == source.digests[0]
