"""``fabric-admin site validate`` says all that is wrong, and ends with a code that scripts see."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric.cli.main import fabric_admin
from fabric.config import shipped_sites


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "fabric/sites"
    folder.mkdir(parents=True)
    return folder


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(fabric_admin, ["site", *map(str, words)])


def test_everything_that_ships_is_valid_and_renders() -> None:
    result = run("validate", "--all", "--format", "json")
    assert result.exit_code == 0, result.stderr
    reports = {each["site"]: each for each in json.loads(result.stdout)}
    assert set(reports) == set(shipped_sites())
    assert all(each["problems"] == [] for each in reports.values())
    assert reports["alcf-polaris"]["rendered"]
    assert not reports["iu-jetstream2"]["rendered"]


def test_what_is_wrong_is_told_with_field_value_and_remedy(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nendpoint: {scheduler: slurm, walltime: 24:00:00}\nprices: 3\n")
    result = run("validate", bad, "local")
    assert result.exit_code == 3
    assert 'put it in quotes: "24:00:00"' in result.stdout
    assert "endpoint.walltime" in result.stdout
    assert "86400" in result.stdout
    assert "prices" in result.stdout
    assert "1 of 2 site files" in result.stderr
    (report, good) = json.loads(run("validate", bad, "local", "--format", "json").stdout)
    assert {each["field"] for each in report["problems"]} == {"endpoint.walltime", "prices"}
    assert good["problems"] == []


def test_own_file_is_validated_with_all_and_must_have_its_name(own: Path) -> None:
    (own / "local.yaml").write_text("name: elsewhere\n")
    result = run("validate", "--all", "--format", "json")
    assert result.exit_code == 3
    (report,) = (each for each in json.loads(result.stdout) if each["problems"])
    assert report["path"] == str(own / "local.yaml")
    assert report["problems"][0]["field"] == "name"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "--all"),
        (["local", "--all"], 2, "--all"),
        (["nowhere"], 3, "the shipped sites are alcf-aurora"),
    ],
)
def test_refusal_says_what_to_give(words: list[str], code: int, said: str) -> None:
    result = run("validate", *words)
    assert result.exit_code == code
    assert said in result.stderr


def test_missing_and_unreadable_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "tangled.yaml").write_text("a: [unclosed")
    result = run("validate", tmp_path / "tangled.yaml", tmp_path)
    assert result.exit_code == 3
    assert result.stdout.count("cannot be read as YAML") == 2


def test_list_tells_own_files_from_shipped_ones(own: Path) -> None:
    (own / "alcf-polaris.yaml").write_text("name: alcf-polaris\n")
    (own / "broken.yaml").write_text("name: [")
    lines = {line.split()[0]: line for line in run("list-shipped").stdout.splitlines()}
    assert "yours" in lines["alcf-polaris"]
    assert "shipped" in lines["alcf-aurora"]
    assert "site validate" in lines["broken"]
    found = json.loads(run("list-shipped", "--format", "json").stdout)
    assert {each["name"] for each in found if each["is_own"]} == {"alcf-polaris", "broken"}
