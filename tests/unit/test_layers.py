"""Imports follow the table in docs/architecture.md, and the SDK stays light."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVERYWHERE = {"errors", "messages"}


def allowed_imports() -> dict[str, set[str]]:
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| ([^|]+) \|$", (ROOT / "docs/architecture.md").read_text(), re.M
    )
    rooms = {room for room, _ in rows}
    table = {}
    for room, names in rows:
        named = set(re.findall(r"\w+", names))
        table[room] = rooms - {"testing"} if named == {"all"} else named
    table["errors"] = set()
    table["workflows"] = {"sdk", "config"}
    return table


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module="fabric", level=0, names=names):
                modules = [f"fabric.{alias.name}" for alias in names if alias.name[0] != "_"]
            case ast.ImportFrom(module=str(module), level=0):
                modules = [module]
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{path}:{node.lineno}: imports are absolute in this project")
            case _:
                continue
        for module in modules:
            if module.startswith("fabric."):
                yield node.lineno, module.split(".")[1]


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts
    return first[1].removesuffix(".py") if first[0] == "fabric" else first[0]


SOURCES = sorted(
    path
    for folder in ("fabric", "workflows")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "fabric/__init__.py" and "migrations" not in path.parts
)


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in SOURCES} <= set(allowed_imports())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_down_the_table(path: Path) -> None:
    room = room_of(path)
    allowed = allowed_imports()[room] | EVERYWHERE | {room}
    wrong = [f"line {line}: {name}" for line, name in imported_rooms(path) if name not in allowed]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which {room!r} may not"


HEAVY = ("torch", "transformers", "parsl", "sqlalchemy", "fastapi", "numpy", "globus_sdk")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("fabric.sdk", HEAVY),
        ("fabric.cli.main", HEAVY),
        ("fabric.engine.interface", HEAVY),
        ("fabric.instance", ("torch", "transformers", "parsl", "sqlalchemy", "fastapi")),
        ("fabric.programs", HEAVY),
        ("fabric.payloads", (*HEAVY, "proxystore", "redis")),
        ("fabric.gateway", ("torch", "transformers", "parsl")),
        ("fabric.broker", ("torch", "transformers", "parsl")),
    ],
)
def test_import_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_config_reads_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if re.search(r"os\.(environ|getenv)\b", path.read_text())
        and room_of(path) not in {"config", "testing"}
    }
    # These hand an environment to a process they start, read the scheduler's, or tell an address to
    # a library that takes it from nowhere else; they read no settings from it.
    assert readers <= {
        "fabric/cli/launching.py",
        "fabric/engine/partition/groups.py",
        "fabric/launch/jobs/inblock.py",
        "fabric/launch/worker.py",
        "fabric/launch/block.py",
        "fabric/cli/processes.py",
        "fabric/cli/demo.py",
        "fabric/engine/vllm/server.py",
    }
