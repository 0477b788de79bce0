"""``fabric plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fabric.cli.exits import Exit
from fabric.cli.main import fabric
from fabric.planning import DEVICES, KNOWN_MODELS


def plan(*args: str) -> Result:
    return CliRunner().invoke(fabric, ["plan", *args])


@pytest.mark.parametrize(
    "args",
    [
        ("Llama-3-70B", "--device", "H100"),
        ("Kimi-K2", "--nodes", "3"),
        ("Llama-3.1-405B", "--device", "A100-40", "--nodes", "100", "--batch", "1000"),
        ("Qwen3-235B-A22B", "--device", "pvc", "--devices-per-node", "13"),
        ("GPT-2", "--dtype", "int4", "--context", "1"),
        (),
        ("--help",),
    ],
    ids=" ".join,
)
def test_what_is_printed_fits_a_terminal(args: tuple[str, ...]) -> None:
    result = plan(*args)
    assert result.exit_code == Exit.OK, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_stage_is_a_line_with_what_its_ranks_hold() -> None:
    result = plan("Kimi-K2", "--device", "H200", "--nodes", "3")
    head, *stages = result.stdout.split("\n\n")[1].splitlines()
    assert head.split()[:5] == ["RANKS", "NODE", "LAYERS", "WEIGHTS", "CACHE"]
    assert [line.split()[:3] for line in stages] == [
        ["0-7", "0", "0-20"],
        ["8-15", "1", "21-40"],
        ["16-23", "2", "41-60"],
    ]
    assert "1,026,408,209,408 parameters, 32,861,477,888 for a token" in result.stdout
    assert "latent" in result.stdout


def test_json_has_every_rank_in_bytes() -> None:
    result = plan("Llama-3-8B", "--device", "A100-40", "--dtype", "fp32", "--format", "json")
    record = json.loads(result.stdout)
    assert record["parameters"] == 8_030_261_248
    assert record["split"]["tensor"] * record["split"]["pipeline"] == len(record["ranks"])
    assert sum(rank["owned_parameters"] for rank in record["ranks"]) == record["parameters"]
    for rank in record["ranks"]:
        parts = ("weight_bytes", "cache_bytes", "activation_bytes", "reserve_bytes")
        assert rank["total_bytes"] == sum(rank[part] for part in parts) <= record["device_bytes"]


def test_without_a_model_what_is_known_is_listed() -> None:
    text = plan().stdout
    assert all(name in text for name in [*KNOWN_MODELS, *DEVICES])
    known = json.loads(plan("--format", "json").stdout)
    assert known["models"]["Llama-3-8B"]["parameters"] == 8_030_261_248
    assert known["devices"]["H200"]["source"]


def test_help_names_the_devices() -> None:
    text = plan("--help").stdout
    assert all(name in text for name in DEVICES)


def test_a_folder_is_planned_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(KNOWN_MODELS["GPT-2"])))
    result = plan(str(tmp_path), "--device", "EPYC")
    assert "124,439,808 parameters" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("Lama-3-8B",), Exit.REFUSED, "did you mean Llama-3-8B?"),
        (("GPT-2", "--device", "H20"), Exit.REFUSED, "did you mean H200?"),
        (("GPT-2", "--context", "1025"), Exit.REFUSED, "at most 1024"),
        (("Kimi-K2",), Exit.REFUSED, "What would fit: --nodes 3; or --dtype int4"),
        (("GPT-2", "--batch", "nan"), Exit.USAGE, "--batch"),
        (("GPT-2", "--batch", "0"), Exit.USAGE, "--batch"),
        (("GPT-2", "--nodes", "-1"), Exit.USAGE, "--nodes"),
        (("GPT-2", "--dtype", "fp8"), Exit.USAGE, "--dtype"),
        (("GPT-2", "--context", "1e30"), Exit.USAGE, "--context"),
    ],
)
def test_what_cannot_be_planned_is_refused(args: tuple[str, ...], code: Exit, said: str) -> None:
    result = plan(*args)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""


def test_a_refusal_in_json_lists_what_would_fit() -> None:
    result = plan("Kimi-K2", "--format", "json")
    error = json.loads(result.stderr)["error"]
    assert error["code"] == "does_not_fit"
    assert "--nodes 3" in error["detail"]["remedies"]
