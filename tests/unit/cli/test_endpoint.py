"""``fabric-admin endpoint`` writes only what it was asked to write."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric.cli.main import fabric_admin
from fabric.config import FileStore, load_store

TRIO = {"config.yaml", "user_config_template.yaml.j2", "user_config_schema.json"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(tmp_path / "gc"))
    return tmp_path / "gc"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(fabric_admin, ["endpoint", *map(str, words)])


def test_render_prints_unless_told_where_to_write(tmp_path: Path, home: Path) -> None:
    printed = run("render", "local-globus")
    assert printed.exit_code == 0
    assert "GlobusComputeEngine" in printed.stdout
    assert str(home / "local-globus") in printed.stdout
    out = tmp_path / "out"
    assert run("render", "local-globus", "--out", out, "--dry-run").stdout != ""
    assert not out.exists()
    files = json.loads(run("render", "local-globus", "--format", "json").stdout)["files"]
    assert set(files) == TRIO
    assert run("render", "local-globus", "--out", out).exit_code == 0
    assert {each.name for each in out.iterdir()} >= TRIO
    assert str(out / "user_config_schema.json") in (out / "config.yaml").read_text()
    assert not home.exists()


def test_install_dry_run_shows_the_difference_and_writes_nothing(home: Path) -> None:
    shown = run("install", "local-globus", "--dry-run")
    assert shown.exit_code == 0
    assert "+allowed_functions: []" in shown.stdout
    assert not home.exists()
    assert run("install", "local-globus").exit_code == 0
    assert run("install", "local-globus", "--dry-run").stdout == ""


def test_function_given_on_the_command_line_is_allowed(home: Path) -> None:
    id = "9a947ba5-f537-4681-acf3-cc66485aadec"
    done = run("install", "local-globus", "--name", "mine", "--function", id, "--format", "json")
    facts = json.loads(done.stdout)
    assert facts["directory"] == str(home / "mine")
    assert facts["endpoint_id"] is None
    assert {each["name"] for each in facts["changed"]} == TRIO
    assert f'allowed_functions: ["{id}"]' in (home / "mine/config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["render", "nowhere"], 3, "shipped sites are alcf-aurora, alcf-polaris"),
        (["render", "local"], 3, "endpoint: {scheduler: local}"),
        (["install", "local-globus", "--name", "../up"], 3, "--name"),
        (["install", "local-globus", "--function", "all"], 2, "not a valid UUID"),
        (["render"], 2, "Missing argument 'FILE'"),
    ],
)
def test_refusal_says_what_to_do(words: list[str], code: int, said: str) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert said in result.stderr


def test_edit_by_hand_is_kept_with_exit_code_3(home: Path) -> None:
    run("install", "local-globus")
    config = home / "local-globus/config.yaml"
    config.write_text("mine: true\n")
    refused = run("install", "local-globus", "--format", "json")
    assert refused.exit_code == 3
    assert json.loads(refused.stderr)["error"]["code"] == "files_foreign"
    assert config.read_text() == "mine: true\n"
    assert run("install", "local-globus", "--force").exit_code == 0
    assert config.with_name("config.yaml.bak").read_text() == "mine: true\n"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("render", "local-globus")
    assert result.exit_code == 3
    assert "fabric-inference[site]" in result.stderr


def test_install_tells_functions_where_large_results_go(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs"
    site = tmp_path / "here.yaml"
    site.write_text(
        f"""
name: here
executor:
  kind: globus-compute
  endpoint_id: 0f3c0f6e-6a2e-4c0e-9a53-0d9b4c1f7a11
  run_dir: {run_dir}
endpoint: {{scheduler: local}}
store: {{kind: file, name: large, directory: {tmp_path / "large"}}}
"""
    )
    done = run("install", site)
    assert done.exit_code == 0, done.output
    assert "file store 'large'" in done.stderr
    assert load_store(run_dir) == FileStore(kind="file", name="large", directory=tmp_path / "large")
    assert (run_dir / "store.json").stat().st_mode & 0o077 == 0
