"""Waits, from recorded output and from programs that print it; see ``recorded/README.md``."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from fabric.errors import RequestInvalid, SchedulerFailed
from fabric.launch import waits
from fabric.launch.waits import estimate_wait, parse_qstat, parse_sbatch

RECORDED = Path(__file__).parent / "recorded"
WEDNESDAY = datetime(2026, 7, 15, 14, 30)
ASKED_AT = datetime(2026, 11, 21, 14, 39, 13)
HEADER = "Job ID  Username Queue Jobname SessID NDS TSK Memory Time  S Time\n"
HOUR_S = 3600.0


def read(name: str) -> str:
    return (RECORDED / name).read_text()


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> Path:
    """Put a scheduler's command on the path; it notes its arguments and its input."""
    program = tmp_path / name
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\ncat > {tmp_path}/input\n{body}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "arguments"


def test_slurm_tells_the_start_of_the_very_job() -> None:
    assert parse_sbatch(read("sbatch-busy.txt"), ASKED_AT) == {"p50": 2515.0, "p90": 2515.0}


def test_a_job_that_would_start_at_once_does_not_wait() -> None:
    assert parse_sbatch(read("sbatch-idle.txt"), ASKED_AT) == {"p50": 0.0, "p90": 0.0}


@pytest.mark.parametrize("name", ["sbatch-partition.txt", "sbatch-nodes.txt", "sbatch-down.txt"])
def test_what_slurm_says_instead_is_told(name: str) -> None:
    with pytest.raises(SchedulerFailed) as failed:
        parse_sbatch(read(name), ASKED_AT)
    assert read(name).strip() in failed.value.message


def test_waits_of_a_pbs_queue_are_quantiles_of_its_jobs() -> None:
    assert parse_qstat(read("qstat-T.txt"), WEDNESDAY) == {"p50": 144.5 * HOUR_S, "p90": None}


@pytest.mark.parametrize(
    ("told", "hours"),
    [
        ("15:15", 0.75),
        ("23:30", 9.0),
        ("Fr 14", 47.5),
        ("Tu 15", 144.5),
        ("We 16", 1.5),
        ("We 14", 167.5),
        ("Aug", 393.5),
        ("2027", 4065.5),
        (">5yrs", 39129.5),
    ],
)
def test_every_form_of_a_start_is_understood(told: str, hours: float) -> None:
    row = f"42.pbs-01 ben prod dock -- 2 128 960gb 01:00 Q {told:>5}\n"
    assert parse_qstat(HEADER + row, WEDNESDAY)["p50"] == hours * HOUR_S


def test_what_pbs_does_not_know_is_not_guessed() -> None:
    unknown = read("qstat-T-unknown.txt")
    assert parse_qstat(unknown, WEDNESDAY) == {"p50": None, "p90": None}


def test_an_empty_queue_has_no_wait() -> None:
    assert parse_qstat("", WEDNESDAY) == {"p50": 0.0, "p90": 0.0}


def test_nothing_waits_on_a_local_host() -> None:
    expected = {"wait_s": {"p50": 0.0, "p90": 0.0}, "source": "local", "raw": ""}
    assert estimate_wait("local", {}) == expected


def test_slurm_is_asked_with_the_jobs_options(tmp_path, monkeypatch) -> None:
    arguments = install(tmp_path, monkeypatch, "sbatch", f"cat {RECORDED}/sbatch-idle.txt >&2")
    options = {"partition": "debug", "nodes": 2, "walltime": "1-00:30:00", "constraint": "a100&ib"}
    answer = estimate_wait("slurm", options)
    assert answer["source"] == "sbatch --test-only"
    assert answer["raw"] == read("sbatch-idle.txt")
    assert set(answer["wait_s"]) == {"p50", "p90"}
    assert arguments.read_text().split("\n")[:-1] == [
        "--test-only",
        "--partition=debug",
        "--nodes=2",
        "--time=1-00:30:00",
        "--constraint=a100&ib",
    ]
    assert (tmp_path / "input").read_text().startswith("#!/bin/sh\n"), "sbatch wants a script"


def test_pbs_is_asked_about_the_queue(tmp_path, monkeypatch) -> None:
    arguments = install(tmp_path, monkeypatch, "qstat", f"cat {RECORDED}/qstat-T-unknown.txt")
    answer = estimate_wait("pbspro", {"queue": "prod"})
    assert arguments.read_text().split() == ["-T", "prod"]
    assert answer["wait_s"] == {"p50": None, "p90": None}


def test_a_refusal_is_told_with_the_command(tmp_path, monkeypatch) -> None:
    install(tmp_path, monkeypatch, "sbatch", f"cat {RECORDED}/sbatch-nodes.txt >&2; exit 1")
    with pytest.raises(SchedulerFailed, match="node configuration is not available") as failed:
        estimate_wait("slurm", {"nodes": 9})
    assert failed.value.detail["command"] == "sbatch --test-only --nodes=9"


def test_a_scheduler_that_is_not_there_or_silent_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerFailed, match="cannot be run"):
        estimate_wait("slurm", {})
    monkeypatch.setattr(waits, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    install(tmp_path, monkeypatch, "sbatch", "exec sleep 30")
    with pytest.raises(SchedulerFailed, match="did not answer"):
        estimate_wait("slurm", {})


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("slurm", {"partition": "debug; rm -rf ~"}),
        ("slurm", {"partition": "--wrap=id"}),
        ("slurm", {"account": "$(id)"}),
        ("slurm", {"nodes": 0}),
        ("slurm", {"nodes": True}),
        ("slurm", {"nodes": "2-"}),
        ("slurm", {"walltime": 3600}),
        ("slurm", {"walltime": ["00:10:00"]}),
        ("slurm", {"partition": "debug\n"}),
        ("slurm", {"wrap": "id"}),
        ("pbspro", {"queue": "-Q"}),
        ("pbspro", {"account": "astro"}),
        ("local", {"nodes": 1}),
        ("lsf", {}),
    ],
)
def test_options_that_are_not_of_their_form_are_refused(
    tmp_path, monkeypatch, scheduler, options
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestInvalid):
        estimate_wait(scheduler, options)
