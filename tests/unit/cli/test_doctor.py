"""Every check of ``fabric-admin doctor`` meets the fault that it is there for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from click.testing import CliRunner

from fabric import __version__
from fabric.cli.doctor import (
    BalanceCheck,
    BooksCheck,
    Check,
    ClockCheck,
    ConfigurationCheck,
    DiskCheck,
    EndpointCheck,
    Finding,
    HubCheck,
    PackagesCheck,
    QueueCheck,
    SchedulerCheck,
    ServiceCheck,
    TokenCheck,
    WeightsCheck,
    examine,
)
from fabric.cli.main import fabric_admin
from fabric.config import (
    ComputeExecutor,
    EndpointSpec,
    SiteModel,
    SiteSpec,
    find_site,
    load_site,
)
from fabric.engine.model import load_model
from fabric.engine.source import ModelSource
from fabric.messages import EngineOptions
from fabric.messages.session import PROTOCOL
from fabric.sql import Database, migrate
from fabric.testing.admin import Admin
from fabric.testing.hub import PROJECT, RunningHub, running_hub
from fabric.testing.tiny_model import save_tiny_llama

RECORDED = Path(__file__).parents[2] / "data/balances"
HEALTHY = {"status": "ok", "release": __version__, "protocol": PROTOCOL}


def run(check: Check) -> list[Finding]:
    """Return what a check finds; whatever is not right comes with a remedy."""
    findings = list(examine([check]))
    assert findings
    assert all(f.remedy for f in findings if f.level in ("warning", "wrong"))
    return findings


def only(check: Check) -> Finding:
    (finding,) = run(check)
    return finding


@contextmanager
def serving(body: object, *, ahead_s: float = 0.0, dated: bool = True) -> Iterator[str]:
    """Serve one JSON document from a machine whose clock is ahead."""

    class Handler(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate((timestamp or time.time()) + ahead_s, usegmt=True)

        def do_GET(self) -> None:
            text = json.dumps(body).encode()
            self.send_response_only(200)
            if dated:
                self.send_header("Date", self.date_time_string())
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub"), sites=("alpha",)) as hub:
        yield hub


# ---- the network ---------------------------------------------------------------------------------


def test_a_hub_of_this_release_is_in_order(hub: RunningHub) -> None:
    assert only(HubCheck(url=hub.base_url)).level == "ok"
    assert only(ClockCheck(url=hub.base_url)).level == "ok"


def test_a_hub_that_is_not_there_is_told_with_what_starts_it(free_port: int) -> None:
    found = only(HubCheck(url=f"http://127.0.0.1:{free_port}"))
    assert found.level == "wrong"
    assert "fabric-admin hub" in found.remedy
    assert only(ClockCheck(url=f"http://127.0.0.1:{free_port}")).level == "skipped"


@pytest.mark.parametrize(
    ("answer", "level", "said"),
    [
        (HEALTHY, "ok", ""),
        ({"hello": "world"}, "wrong", "log"),
        ([1, 2], "wrong", "log"),
        (HEALTHY | {"status": "failing"}, "wrong", "log"),
        (HEALTHY | {"protocol": PROTOCOL - 1, "release": "0.0.1"}, "wrong", "==0.0.1"),
        (HEALTHY | {"release": "0.0.1"}, "warning", "one release"),
    ],
)
def test_a_hub_that_would_not_understand_us_is_told(answer: object, level: str, said: str) -> None:
    with serving(answer) as url:
        found = only(HubCheck(url=url))
    assert found.level == level
    assert said in found.remedy


@pytest.mark.parametrize(
    ("ahead_s", "level", "said"),
    [(0, "ok", ""), (-12, "warning", "ahead of"), (300, "wrong", "behind")],
)
def test_clocks_that_differ_are_told(ahead_s: float, level: str, said: str) -> None:
    with serving(HEALTHY, ahead_s=ahead_s) as url:
        found = only(ClockCheck(url=url))
    assert found.level == level
    assert said in found.detail
    if level == "wrong":
        assert any(f"{seconds} s behind" in found.detail for seconds in range(295, 306))


def test_a_server_that_tells_no_time_is_skipped() -> None:
    with serving(HEALTHY, dated=False) as url:
        assert only(ClockCheck(url=url)).level == "skipped"


def test_a_key_is_the_sites_own_or_is_refused(hub: RunningHub) -> None:
    _, agents = hub.keys.add_key(PROJECT, scopes=("site",), site="alpha")
    assert only(TokenCheck(url=hub.base_url, token=agents, site="alpha")).level == "ok"
    for token, site in ((agents, "beta"), (hub.api_key, "alpha"), ("fab_nonsense", "alpha")):
        found = only(TokenCheck(url=hub.base_url, token=token, site=site))
        assert found.level == "wrong"
        assert f"--scope site --site {site}" in found.remedy
        assert token not in found.detail


def test_a_service_or_a_queue_behind_a_firewall_is_told(free_port: int) -> None:
    for check in (
        ServiceCheck(url=f"http://127.0.0.1:{free_port}"),
        QueueCheck(host="127.0.0.1", port=free_port),
        QueueCheck(host="nowhere.invalid"),
    ):
        found = only(check)
        assert found.level == "wrong"
        assert "let this machine dial" in found.remedy


def test_a_service_that_refuses_the_installed_sdk_is_told() -> None:
    with serving({"min_sdk_version": "999.0.0"}) as url:
        assert "pip install --upgrade" in only(ServiceCheck(url=url)).remedy
    with serving({"min_sdk_version": "1.0.0"}) as url:
        assert only(ServiceCheck(url=url)).level == "ok"
    with serving("no version") as url:
        assert only(ServiceCheck(url=url)).level == "wrong"


def test_an_endpoint_is_not_asked_about_without_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(tmp_path))
    for name in ("GLOBUS_COMPUTE_CLIENT_ID", "GLOBUS_COMPUTE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    executor = ComputeExecutor(kind="globus-compute", endpoint_id=uuid4())
    found = only(EndpointCheck(executor=executor))
    assert found.level == "skipped"
    assert "GLOBUS_COMPUTE_CLIENT_ID" in found.remedy


# ---- this machine --------------------------------------------------------------------------------


def test_a_full_disk_is_told() -> None:
    assert only(DiskCheck(path=Path("/proc"))).level == "wrong"


def test_room_is_counted_where_a_directory_will_be(tmp_path: Path) -> None:
    missing = tmp_path / "not/yet"
    free_bytes = shutil.disk_usage(tmp_path).free
    for needed_bytes, level in ((1, "ok"), (free_bytes // 2, "warning"), (2**60, "wrong")):
        assert only(DiskCheck(path=missing, needed_bytes=needed_bytes)).level == level


def test_what_is_installed_fits_this_release() -> None:
    for extra in ("hub", "site"):
        assert only(PackagesCheck(extra=extra)).level == "ok"


def test_packages_that_do_not_fit_are_told_with_their_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "rig_release-1.0.dist-info/METADATA"
    about.parent.mkdir()
    about.write_text(
        "Metadata-Version: 2.1\nName: rig-release\nVersion: 1.0\nRequires-Python: >=9.9\n"
        "Requires-Dist: click>=99\nRequires-Dist: no-such-package; extra == 'site'\n"
        "Requires-Dist: not-this-one; extra == 'hub'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    python, packages = run(PackagesCheck(extra="site", distribution="rig-release"))
    assert ">=9.9 is needed" in python.detail
    assert ">=99 is needed" in packages.detail
    assert "no-such-package is not installed" in packages.detail
    assert "not-this-one" not in packages.detail
    assert "rig-release[site]" in packages.remedy


# ---- the site ------------------------------------------------------------------------------------


def test_everything_wrong_in_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "anvil.yaml"
    file.write_text("name: anvil\ncolour: red\nmodels: [{name: x}]\n")
    found = run(ConfigurationCheck(path=file))
    assert {"colour", "models.0.source"} <= {one.detail.split(" is ")[0] for one in found}
    file.write_text("name: anvil\n")
    assert only(ConfigurationCheck(path=file)).level == "ok"
    assert only(ConfigurationCheck(path=tmp_path / "none.yaml")).level == "wrong"


def test_a_machine_without_its_schedulers_commands_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm = EndpointSpec(scheduler="slurm", partition="gpu", walltime="01:00:00")
    found = only(SchedulerCheck(endpoint=slurm))
    assert (found.level, "sbatch" in found.detail) == ("wrong", True)
    pbs = EndpointSpec(scheduler="pbspro", queue="prod", walltime="01:00:00", cpus_per_node=8)
    assert "qstat" in only(SchedulerCheck(endpoint=pbs)).detail
    assert only(SchedulerCheck(endpoint=EndpointSpec(scheduler="local"))).level == "skipped"


def test_a_project_that_has_nothing_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    polaris = load_site(find_site("alcf-polaris"))
    unknown = only(BalanceCheck(site=polaris, project="neutrinoGPU"))
    assert (unknown.level, "login node" in unknown.remedy) == ("wrong", True)
    program = tmp_path / "sbank-list-allocations"
    text = (RECORDED / "sbank-polaris.txt").read_text()
    program.write_text(f"#!{sys.executable} -IS\nprint({text!r})\n")
    program.chmod(0o755)
    spent = only(BalanceCheck(site=polaris, project="neutrinoGPU"))
    assert (spent.level, "-394.1 node hours" in spent.detail) == ("wrong", True)
    assert only(BalanceCheck(site=polaris, project=None)).level == "skipped"
    assert only(BalanceCheck(site=SiteSpec(name="here"), project="p")).level == "skipped"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> SiteModel:
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    options = EngineOptions(dtype="float32")
    return SiteModel(name="tiny", source=str(folder), context_tokens=64, options=options)


def test_weights_of_another_digest_are_found_by_reading_them(model: SiteModel) -> None:
    file = Path(model.source) / "model.safetensors"
    digest = load_model(ModelSource.parse(model.source), name="tiny", dtype="float32").digest
    assert only(WeightsCheck(model=model, digest=digest, in_full=True)).level == "ok"
    assert "none yet" in only(WeightsCheck(model=model, in_full=True)).detail
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x10
    file.write_bytes(data)
    assert only(WeightsCheck(model=model, digest=digest)).level == "ok"
    found = only(WeightsCheck(model=model, digest=digest, in_full=True))
    assert found.level == "wrong"
    assert digest in found.detail
    assert "fetch the version's files again" in found.remedy


def test_weights_that_are_cut_short_or_missing_are_found_without_reading(model: SiteModel) -> None:
    folder = Path(model.source)
    file = folder / "model.safetensors"
    assert only(WeightsCheck(model=model)).level == "ok"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file.name, "b": "part-2.safetensors"}}))
    assert "part-2.safetensors is missing" in only(WeightsCheck(model=model)).detail
    index.write_text("[]")
    assert "not an index" in only(WeightsCheck(model=model)).detail
    index.unlink()
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is damaged" in only(WeightsCheck(model=model)).detail
    file.unlink()
    assert "has no *.safetensors" in only(WeightsCheck(model=model, in_full=True)).detail
    shutil.rmtree(folder)
    assert "`source`" in only(WeightsCheck(model=model)).remedy


# ---- the books -----------------------------------------------------------------------------------


def test_remedies_are_commands_that_lead_to_a_site_that_can_serve(
    admin: Admin, tmp_path: Path
) -> None:
    file = tmp_path / "anvil.yaml"
    file.write_text("name: anvil\nmodels: [{name: toy, source: 'a:b', context_tokens: 9}]\n")
    admin.ok("project", "add", "astro")
    check = BooksCheck(database_url=admin.url, site=load_site(file))
    remedies = []
    for _ in range(10):
        lacks = [one for one in run(check) if one.level == "wrong"]
        if not lacks:
            break
        remedy = lacks[0].remedy.split(" > ")[0].replace("PROJECT", "astro")
        words = shlex.split(remedy.replace("FILE", str(file)))
        assert words[0] == "fabric-admin"
        admin.ok(*words[1:])
        remedies.append(words[1])
    assert remedies == ["site", "model", "rate", "alloc", "key"]
    admin.ok("site", "modify", "anvil", "--state", "disabled")
    assert "--state enabled" in run(check)[-1].remedy


def test_books_that_do_not_add_up_are_told(admin: Admin, tmp_path: Path) -> None:
    admin.ok("project", "add", "astro")
    admin.ok("alloc", "add", "astro", "--su", "5")
    with closing(sqlite3.connect(tmp_path / "hub.db")) as connection, connection:
        connection.execute("UPDATE accounts SET balance_usu = balance_usu + 1")
    assert only(BooksCheck(database_url=admin.url)).level == "wrong"


def test_another_releases_database_is_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    with Database(url) as database:
        migrate(database, "0001_ledger")
    found = only(BooksCheck(database_url=url))
    assert (found.level, found.remedy) == ("warning", "fabric-admin db migrate")
    assert only(BooksCheck(database_url=f"sqlite:///{tmp_path}/none/hub.db")).level == "wrong"


# ---- the command ---------------------------------------------------------------------------------


class _Failing:
    name = "failing"

    def run(self) -> Iterator[Finding]:
        raise ZeroDivisionError("division by zero")


def test_a_check_that_fails_does_not_hide_the_others() -> None:
    first, second = examine([_Failing(), DiskCheck(path=Path("/proc"))])
    assert (first.level, "ZeroDivisionError" in first.detail) == ("wrong", True)
    assert second.check == "disk"


def test_the_command_ends_with_one_when_something_is_wrong(
    hub: RunningHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FABRIC_STATE_DIR", str(tmp_path / "state"))
    file = tmp_path / "alpha.yaml"
    model = {"name": "tiny", "source": str(tiny), "context_tokens": 64}
    file.write_text(json.dumps({"name": "alpha", "models": [model]}))
    words = ["doctor", str(file), "--hub", hub.base_url]
    well = CliRunner().invoke(fabric_admin, words)
    assert well.exit_code == 0, well.stdout
    assert "Nothing is wrong." in well.stderr
    # A path alone is not broken.
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in well.stdout.splitlines())
    file.write_text(json.dumps({"name": "alpha", "models": [model | {"source": "/nowhere"}]}))
    ill = CliRunner().invoke(fabric_admin, [*words, "--format", "json"])
    assert ill.exit_code == 1
    told = json.loads(ill.stdout)
    assert told["num_wrong"] == 1
    assert [f["check"] for f in told["findings"] if f["level"] == "wrong"] == ["weights of tiny@1"]
    assert CliRunner().invoke(fabric_admin, ["doctor", "no-such-site"]).exit_code == 3
