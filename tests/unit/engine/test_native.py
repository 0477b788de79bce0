"""The kernels are compiled once, kept, and made again when what was kept is not theirs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fabric.engine import native


@pytest.fixture
def compilations(tmp_path, monkeypatch):
    """Keep kernels in a directory of the test's own; list what is compiled."""
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    commands = []
    run = subprocess.run

    def count(command, **more):
        commands.append(command)
        return run(command, **more)

    monkeypatch.setattr(native.subprocess, "run", count)
    return commands


def load():
    return native._load.__wrapped__()


def works(loaded):
    weight, x = torch.randn(9, 6), torch.randn(4, 6)
    product = loaded.linear(x, loaded.pack(weight), None, 9)
    return torch.allclose(product, x @ weight.T, atol=1e-5)


@pytest.mark.slow
def test_damaged_kernels_are_compiled_again_and_then_kept(compilations, caplog):
    kept = native._kept(native.read_source(), Path(shutil.which("gcc") or shutil.which("cc")))
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"not a library")
    assert works(load())
    assert "damaged" in caplog.text
    assert works(load())
    assert len(compilations) == 1
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.slow
def test_without_a_place_to_keep_them_kernels_are_compiled_all_the_same(compilations, tmp_path):
    (tmp_path / "fabric").write_text("a file where a directory should be")
    assert works(load())
    assert len(compilations) == 1


def test_without_a_working_compiler_torch_computes(compilations, monkeypatch, caplog):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert load() is None
    monkeypatch.setattr(native.shutil, "which", lambda name: "/bin/false")
    assert load() is None


def test_loading_the_kernels_leaves_small_numbers_as_they_are() -> None:
    code = (
        "from fabric.engine.native import load_native; import sys;"
        "assert load_native() is not None; print(sys.float_info.min / 4 > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
