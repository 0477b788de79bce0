"""What is shipped is whole: a wheel in a clean environment has every room and asks a hub."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSIDE = (
    "fabric/py.typed",
    "fabric/endpoints/__init__.py",
    "fabric/endpoints/templates/base/config.yaml",
    "fabric/site_configs/local.yaml",
    "fabric/workflows/screen.py",
    "fabric/sql/migrations/env.py",
)


def run(*argv: str | Path, **kwargs: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    source = tmp_path_factory.mktemp("source")
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", out, source)
    return out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_and_sdist_carry_the_folders_beside_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert set(INSIDE) <= in_wheel
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fabric").rglob("*.py")}
    assert modules <= in_wheel, f"not listed in setup.cfg: {modules - in_wheel}"
    assert {"site-configs/local.yaml", "workflows/screen.py", "LICENSE"} <= in_sdist


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_installed_wheel_asks_a_hub(built: Path, tmp_path: Path) -> None:
    from fabric.testing.hub import running_hub

    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "-q", f"{wheel}[sdk]", "-c", ROOT / "constraints.txt")
    assert "Ask large models" in run(tmp_path / "venv/bin/fabric", "--help", cwd=tmp_path)
    with running_hub(tmp_path) as hub:
        answer = run(
            *(tmp_path / "venv/bin/fabric", "query", "hello", "--max-tokens", "3"),
            *("--base-url", hub.base_url, "--api-key", hub.api_key),
            cwd=tmp_path,
        )
    assert answer.strip() == "word0 word1 word2"
    sites = "from fabric.config import shipped_sites; print(*shipped_sites())"
    shipped = {path.stem for path in (ROOT / "site-configs").glob("*.yaml")}
    assert set(run(python, "-c", sites, cwd=tmp_path).split()) == shipped
