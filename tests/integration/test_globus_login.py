"""Globus logins from end to end: a terminal, the SDK, a hub, and a Globus Auth of this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fabric.auth import Users
from fabric.auth.globus import CACHE_S
from fabric.errors import LoginRequired, NotAMember, ProjectNotChosen
from fabric.sdk import Fabric
from fabric.testing.admin import Admin
from fabric.testing.clock import Clock
from fabric.testing.globus.campus import Campus, running_campus
from fabric.testing.hub import PROJECT, RunningHub, running_hub, wait_until
from fabric.testing.terminal import Terminal

FABRIC = [sys.executable, "-m", "fabric.cli"]
TOKEN = "/v2/oauth2/token"


@pytest.fixture
def campus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Campus]:
    with running_campus() as campus:
        for name, value in campus.service.environ.items():
            monkeypatch.setenv(name, value)
        yield campus


@pytest.fixture
def clock() -> Clock:
    """The hub's, for how long it believes what Globus Auth said."""
    return Clock()


@pytest.fixture
def hub(campus: Campus, clock: Clock, tmp_path: Path) -> Iterator[RunningHub]:
    with running_hub(
        tmp_path,
        tokens=lambda database: campus.get_tokens(
            campus.add_groups(database, survey=PROJECT),
            Users(database),
            monotonic=clock.monotonic,
        ),
    ) as hub:
        yield hub


@pytest.fixture
def environ(
    campus: Campus, hub: RunningHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The environment of somebody at a machine of theirs; this process's too."""
    for name in [name for name in os.environ if name.startswith("FABRIC_")]:
        monkeypatch.delenv(name)
    settings = {
        "FABRIC_BASE_URL": hub.base_url,
        "FABRIC_GLOBUS_HUB_CLIENT_ID": campus.hub.id,
        "FABRIC_GLOBUS_CLIENT_ID": campus.app.id,
        "FABRIC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "COLUMNS": "400",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


def run(environ: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FABRIC, *args], env=environ, capture_output=True, text=True, timeout=120, check=False
    )


def log_in(campus: Campus, environ: dict[str, str], *, who: str = "alice", code: str = "") -> str:
    """Log in at a terminal, with a browser elsewhere; return what was seen there."""
    terminal = Terminal(environ, *FABRIC, "login", "--no-browser")
    page = terminal.read_until(r"(http://\S+/v2/oauth2/authorize\S+)\s[\s\S]*Code: ", 60)
    url = re.findall(r"http://\S+/v2/oauth2/authorize\S+", page)[0]
    terminal.type((code or campus.service.browse(url, getattr(campus, who))) + "\n")
    assert terminal.finish() == (4 if code else 0), terminal.seen
    return terminal.seen


def count_refreshes(campus: Campus) -> int:
    return sum(
        grant.kind == "access" and grant.client_id == campus.app.id
        for grant in campus.directory.grants()
    )


def test_login_query_and_logout_at_a_terminal(
    campus: Campus, hub: RunningHub, environ: dict[str, str], clock: Clock, tmp_path: Path
) -> None:
    before = run(environ, "query", "hello")
    assert (before.returncode, "fabric login" in before.stderr) == (4, True)

    seen = log_in(campus, environ)
    assert "alice@example.edu" in seen
    kept = tmp_path / "state/login.db"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700

    answered = run(environ, "query", "hello", "--max-tokens", "3", "-vv")
    assert (answered.returncode, answered.stdout) == (0, "word0 word1 word2\n")
    assert hub.catalog.runs(PROJECT)[0].key_id == f"globus:{campus.alice.id}"
    me = json.loads(run(environ, "whoami", "--format", "json").stdout)
    assert (me["user"], me["project"], me["auth"]) == ("alice@example.edu", PROJECT, "globus")
    assert me["expires_at"] > "20"
    shown = run(environ, "whoami").stdout
    assert re.search(rf"user +alice@example.edu\nproject +{PROJECT}\n", shown)

    [token] = [
        grant.value
        for grant in campus.directory.grants()
        if (grant.kind, grant.resource_server) == ("access", campus.hub.id)
    ]
    out = run(environ, "logout")
    assert out.returncode == 0
    assert campus.directory.identity_of(token) is None
    assert token.encode() not in kept.read_bytes()
    after = run(environ, "query", "hello")
    assert (after.returncode, "fabric login" in after.stderr) == (4, True)
    assert run(environ, "logout").returncode == 4
    clock.advance(CACHE_S)
    header = {"authorization": f"Bearer {token}"}
    reply = httpx.get(f"{hub.base_url}/v1/models", headers=header)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "token_expired")


def test_wrong_code_keeps_the_login_there_was(campus: Campus, environ: dict[str, str]) -> None:
    log_in(campus, environ)
    assert "did not complete" in log_in(campus, environ, code="0" * 32)
    assert run(environ, "models").returncode == 0


def test_login_of_another_user_replaces_the_first(campus: Campus, environ: dict[str, str]) -> None:
    log_in(campus, environ)
    seen = log_in(campus, environ, who="bob")
    assert "bob@example.edu" in seen
    assert "Astro survey" in seen
    refused = run(environ, "query", "hello")
    assert (refused.returncode, "Astro survey" in refused.stderr) == (4, True)


def test_expired_token_is_renewed_once_for_all_who_wait(
    campus: Campus, hub: RunningHub, environ: dict[str, str], clock: Clock
) -> None:
    log_in(campus, environ)
    with Fabric() as fabric:
        assert fabric.complete("hello", max_tokens=2).text == "word0 word1"
        tokens = count_refreshes(campus)
        campus.directory.expire_tokens()
        clock.advance(CACHE_S)
        futures = [fabric.submit("hello", max_tokens=2) for _ in range(8)]
        assert {future.result(60).text for future in futures} == {"word0 word1"}
        assert count_refreshes(campus) == tokens + 1
        with fabric.stream("hello", max_tokens=2) as stream:
            assert "".join(chunk.text for chunk in stream) == "word0 word1"
        assert count_refreshes(campus) == tokens + 1


def test_token_that_no_refresh_helps_is_an_error_after_one_try(
    campus: Campus, hub: RunningHub, environ: dict[str, str], clock: Clock
) -> None:
    log_in(campus, environ)
    with Fabric() as fabric:
        fabric.models()
        for grant in campus.directory.grants():
            campus.directory.revoke(grant.value)
        clock.advance(CACHE_S)
        before = campus.service.num_calls[TOKEN]
        with pytest.raises(LoginRequired, match="fabric login"):
            fabric.models()
        assert campus.service.num_calls[TOKEN] == before + 1


def test_login_while_another_process_runs_is_noticed(
    campus: Campus, hub: RunningHub, environ: dict[str, str], clock: Clock
) -> None:
    log_in(campus, environ)
    with Fabric() as fabric:
        fabric.models()
        assert run(environ, "logout").returncode == 0
        log_in(campus, environ)
        clock.advance(CACHE_S)
        assert fabric.whoami().user == "alice@example.edu"


def test_one_who_is_blocked_is_refused_within_a_second_and_let_in_again(
    campus: Campus, hub: RunningHub, tmp_path: Path
) -> None:
    admin = Admin(f"sqlite:///{tmp_path / 'hub.sqlite'}")
    headers = {"authorization": f"Bearer {campus.token(campus.bob)}"}

    def status() -> int:
        return httpx.get(f"{hub.base_url}/v1/models", headers=headers, timeout=60).status_code

    assert status() == 403
    admin.ok("user", "add", PROJECT, "bob@example.edu")
    wait_until(lambda: status() == 200, timeout_s=30)
    admin.ok("user", "block", f"globus:{campus.bob.id}", "--reason", "he left", "-y")
    wait_until(lambda: status() == 403, timeout_s=30)
    told = httpx.get(f"{hub.base_url}/v1/models", headers=headers, timeout=60).json()["error"]
    assert (told["code"], "he left" in told["message"]) == ("user_blocked", True)
    admin.ok("user", "unblock", "bob@example.edu", "-y")
    wait_until(lambda: status() == 200, timeout_s=30)


def test_several_projects_need_a_choice(
    campus: Campus, hub: RunningHub, environ: dict[str, str]
) -> None:
    campus.directory.add_member(campus.lab, campus.alice)
    assert f"bio, {PROJECT}" in log_in(campus, environ)
    undecided = run(environ, "whoami")
    assert (undecided.returncode, f"bio, {PROJECT}" in undecided.stdout) == (0, True)
    with Fabric() as fabric, pytest.raises(ProjectNotChosen, match="FABRIC_PROJECT"):
        fabric.models()
    with Fabric(project=PROJECT) as fabric:
        assert fabric.complete("hello", max_tokens=1).text == "word0"
    with Fabric(project="unheard-of") as fabric, pytest.raises(NotAMember):
        fabric.models()
    assert run(environ, "usage", "--project", "bio").returncode == 0
    assert run(environ | {"FABRIC_PROJECT": PROJECT}, "query", "hello").returncode == 0


def test_service_logs_in_as_itself_and_keeps_nothing(
    campus: Campus, hub: RunningHub, environ: dict[str, str], tmp_path: Path
) -> None:
    service = campus.directory.add_client("nightly screening")
    campus.directory.add_member(campus.survey, campus.directory.account(service.id))
    assert service.secret is not None
    environ |= {
        "FABRIC_GLOBUS_CLIENT_ID": service.id,
        "FABRIC_GLOBUS_CLIENT_SECRET": service.secret,
    }
    assert run(environ, "query", "hello", "--max-tokens", "1").stdout == "word0\n"
    assert hub.catalog.runs(PROJECT)[0].key_id == f"globus:{service.id}"
    shown = run(environ, "config", "show").stdout
    assert service.id in shown
    assert service.secret[:6] not in shown
    assert not (tmp_path / "state/login.db").exists()


def test_api_key_goes_before_the_login(
    campus: Campus, hub: RunningHub, environ: dict[str, str]
) -> None:
    log_in(campus, environ)
    with Fabric(api_key=hub.api_key) as fabric:
        assert fabric.whoami().auth == "api-key"
    with Fabric() as fabric:
        assert fabric.whoami().auth == "globus"


def test_login_is_for_one_hub_alone(campus: Campus, environ: dict[str, str]) -> None:
    log_in(campus, environ)
    with Fabric("http://127.0.0.1:9") as fabric, pytest.raises(LoginRequired, match=":9"):
        fabric.models()


def test_commands_say_what_is_missing(environ: dict[str, str], campus: Campus) -> None:
    for name in ("FABRIC_GLOBUS_CLIENT_ID", "FABRIC_GLOBUS_HUB_CLIENT_ID"):
        done = run({**environ, name: ""}, "login")
        assert done.returncode == 3
        assert name.removeprefix("FABRIC_").lower() in done.stderr
    done = run(environ, "login", "--no-browser", "--base-url", "http://127.0.0.1:9")
    assert (done.returncode, "oauth2/authorize" in done.stderr) == (130, True)


def test_login_and_logout_without_globus_say_so(campus: Campus, environ: dict[str, str]) -> None:
    log_in(campus, environ)
    terminal = Terminal(environ, *FABRIC, "login", "--no-browser")
    terminal.read_until("Code: ", 60)
    campus.service.stop()
    terminal.type("0" * 32 + "\n")
    assert terminal.finish() == 5
    out = run(environ, "logout")
    assert (out.returncode, "could not be asked" in out.stderr) == (0, True)
    assert run(environ, "models").returncode == 4


def test_damaged_file_of_logins_is_told(
    campus: Campus, environ: dict[str, str], tmp_path: Path
) -> None:
    log_in(campus, environ)
    (tmp_path / "state/login.db").write_bytes(b"not a database, whatever its name says")
    done = run(environ, "models")
    assert (done.returncode, "login.db" in done.stderr) == (4, True)
    for state_dir in (tmp_path / "state", tmp_path / "state/login.db"):
        done = run(environ | {"FABRIC_STATE_DIR": str(state_dir)}, "login", "--no-browser")
        assert (done.returncode, "cannot be kept" in done.stderr) == (3, True)


def test_tokens_are_in_no_log_and_no_database(
    campus: Campus, hub: RunningHub, environ: dict[str, str], tmp_path: Path
) -> None:
    """``tmp_path`` holds the hub's database; the login's file is the one place for tokens."""
    log_in(campus, environ)
    said = [run(environ, *args, "-vv") for args in (["query", "hello"], ["whoami"], ["logout"])]
    assert [done.returncode for done in said] == [0, 0, 0]
    tokens = [grant.value for grant in campus.directory.grants()]
    assert tokens
    log = "".join(done.stdout + done.stderr for done in said)
    assert "globus_sdk" in log
    written = b"".join(path.read_bytes() for path in tmp_path.glob("hub.sqlite*"))
    assert campus.alice.id.encode() in written
    for token in tokens:
        assert token not in log
        assert token.encode() not in written


@pytest.mark.slow
def test_hub_process_is_configured_by_its_settings(
    campus: Campus, tmp_path: Path, free_port: int
) -> None:
    assert campus.hub.secret is not None
    environ = {name: v for name, v in os.environ.items() if not name.startswith("FABRIC_")} | {
        "FABRIC_HUB_DATABASE_URL": f"sqlite:///{tmp_path / 'hub.db'}",
        "FABRIC_HUB_PORT": str(free_port),
        "FABRIC_HUB_GLOBUS_CLIENT_ID": campus.hub.id,
        "FABRIC_HUB_GLOBUS_CLIENT_SECRET": campus.hub.secret,
        "FABRIC_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    admin = [sys.executable, "-m", "fabric.cli.admin"]
    for args in (
        ["project", "add", "astro"],
        ["project", "group", "add", "astro", campus.survey.id],
    ):
        subprocess.run([*admin, *args], env=environ, check=True, timeout=120)
    half = environ | {"FABRIC_HUB_GLOBUS_CLIENT_SECRET": ""}
    refused = subprocess.run(
        [*admin, "hub"], env=half, capture_output=True, text=True, check=False, timeout=120
    )
    assert (refused.returncode, "globus_client_secret" in refused.stderr) == (3, True)

    url, header = f"http://127.0.0.1:{free_port}", f"Bearer {campus.token(campus.alice)}"
    log_path = tmp_path / "hub.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([*admin, "hub", "-vv"], env=environ, stdout=log, stderr=log)
    try:
        wait_until(lambda: _answers(url) or process.poll() is not None, timeout_s=120)
        with httpx.Client(base_url=url, timeout=60) as client:
            reply = client.get("/v1/fabric/whoami", headers={"authorization": header})
            assert reply.json()["user"] == "alice@example.edu"
            assert reply.json()["projects"] == ["astro"]
            campus.service.stop()
            stranger = {"authorization": f"Bearer {campus.token(campus.bob)}"}
            assert client.get("/v1/models", headers={"authorization": header}).is_success
            reply = client.get("/v1/models", headers=stranger)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert reply.json()["error"]["code"] == "auth_unavailable"
    finally:
        process.terminate()
        process.wait(60)
    told = log_path.read_text()
    assert "globus_sdk" in told
    for secret in (*(grant.value for grant in campus.directory.grants()), campus.hub.secret):
        assert secret not in told


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).is_success
    except httpx.TransportError:
        return False
