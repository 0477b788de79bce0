"""``fabric-admin alloc balance`` asks the centre, in its own unit."""

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric.cli.main import fabric_admin

RECORDED = Path(__file__).parents[2] / "data/balances"


@pytest.fixture(autouse=True)
def polaris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this machine a login node of Polaris, as far as sbank goes."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    program = tmp_path / "sbank-list-allocations"
    text = (RECORDED / "sbank-polaris.txt").read_text()
    program.write_text(f"#!{sys.executable} -IS\nprint({text!r})\n")
    program.chmod(0o755)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(fabric_admin, ["alloc", "balance", *map(str, words)])


def test_balance_is_shown_with_unit_and_time() -> None:
    shown = run("alcf-polaris", "--project", "neutrinoGPU")
    assert shown.exit_code == 0, shown.stderr
    assert "-394.1 node hours" in shown.stdout
    assert "as of (UTC)" in shown.stdout
    found = json.loads(run("alcf-polaris", "--project", "neutrinoGPU", "--format", "json").stdout)
    assert found["site"] == "alcf-polaris"
    assert found["balance"]["available"] == "-394.1"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["alcf-polaris"], 2, "--project"),
        (["nowhere", "--project", "p"], 3, "shipped sites are"),
        (["eurohpc-lumi", "--project", "p"], 3, "`lumi-allocations`"),
        (["nersc-perlmutter", "--project", "p"], 3, "token"),
        (["alcf-polaris", "--project", "-x"], 3, "project"),
        (["alcf-aurora", "--project", "p"], 5, "no allocation of 'p'"),
        (["olcf-frontier", "--project", "p"], 5, "login node"),
    ],
)
def test_refusal_says_what_to_do(words: list[str], code: int, said: str) -> None:
    result = run(*words)
    assert result.exit_code == code, result.stderr
    assert said in result.stderr
