"""Balances are what the centres' own commands say, and a command that fails says what to do."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fabric.config import SiteSpec, find_site, load_site
from fabric.errors import BalanceUnavailable, RequestInvalid, SettingInvalid
from fabric.launch.balances import (
    Balance,
    BalanceSource,
    CommandBalance,
    FacilityBalance,
    SlurmBalance,
    accounts,
    command,
    get_balance_source,
    mybalance,
    sbank,
    showusage,
    slurm,
    sreport,
    taccinfo,
)

DATA = Path(__file__).parents[2] / "data/balances"


def read(name: str) -> str:
    return (DATA / name).read_text()


@pytest.mark.parametrize(
    ("balance", "unit", "granted", "used", "available"),
    [
        (
            sbank.parse(read("sbank-polaris.txt"), "neutrinoGPU", "polaris"),
            *("node hours", "-394.05", "0.05", "-394.1"),
        ),
        (
            sbank.parse(read("sbank-all.txt"), "ProjectX", "theta"),
            *("node hours", "26568697.8", "1084770.3", "25483927.5"),
        ),
        (
            sbank.parse(read("sbank-improv.txt"), "support", "improv"),
            *("node hours", "10582.0", "1463.5", "9118.5"),
        ),
        (
            accounts.parse(read("accounts-delta.txt"), "bbka-delta-gpu"),
            *("hours", "5000000", "0", "5000000"),
        ),
        (accounts.parse(read("accounts-deltaai.txt"), "bgcd-dtai-gh"), "hours", "100", "8", "92"),
        (
            showusage.parse(read("showusage.txt"), "ABC123"),
            *("node-hours", "20000", "126.3", "19873.7"),
        ),
        (
            mybalance.parse(read("mybalance-roar.txt"), "dml129-engagement"),
            *("hours", "67200", "11530.7", "55669.3"),
        ),
        (
            mybalance.parse(read("mybalance-roar.txt"), "dml129-engagement_gpu"),
            *("hours", "80640", "0", "80640"),
        ),
        (mybalance.parse(read("mybalance-anvil.txt"), "astro"), "SU", "150.0", "0.5", "149.5"),
        (mybalance.parse(read("mybalance-anvil.txt"), "astro-gpu"), "SU", "100", "0", "100"),
        # Anvil hides what is overdrawn.
        (mybalance.parse(read("mybalance-anvil.txt"), "gifted"), "SU", "0.1", "0.1", "0"),
        (taccinfo.parse(read("taccinfo-frontera.txt"), "TACC-SCI"), "SU", None, None, "102149"),
        (taccinfo.parse(read("taccinfo-lonestar6.txt"), "OTH24028"), "SU", None, None, "525"),
        (
            taccinfo.parse(read("taccinfo-overdrawn.txt"), "FTA-SUB-Dawso"),
            "SU",
            None,
            None,
            "-3571",
        ),
        (
            slurm.parse(read("assoc_mgr-limited-qos.txt"), "accounta"),
            *("billing hours", Decimal(1000) / 60, "0", Decimal(1000) / 60),
        ),
    ],
)
def test_balance_is_what_the_centre_wrote(
    balance: Balance, unit: str, granted: str | None, used: str | None, available: str
) -> None:
    expected = [None if each is None else Decimal(each) for each in (granted, used, available)]
    assert [balance.granted, balance.used, balance.available] == expected
    assert balance.unit == unit
    assert timedelta() <= datetime.now(UTC) - balance.as_of < timedelta(hours=26)


@pytest.mark.parametrize(
    "parse",
    [
        lambda: sbank.parse(read("sbank-all.txt"), "ProjectX", "aurora"),
        lambda: sbank.parse("", "ProjectX", "theta"),
        lambda: accounts.parse(read("accounts-delta.txt"), "bbka-delta"),
        lambda: accounts.parse(read("accounts-deltaai.txt"), "Account"),
        lambda: showusage.parse(read("showusage.txt"), "Project"),
        lambda: mybalance.parse(read("mybalance-roar.txt"), "dml129"),
        lambda: mybalance.parse(read("mybalance-roar.txt"), "Project"),
        lambda: mybalance.parse(read("mybalance-anvil.txt"), "Allocation"),
        lambda: mybalance.parse(read("mybalance-anvil.txt"), "Account"),
        lambda: mybalance.parse(read("mybalance-anvil.txt"), "astr"),
        lambda: taccinfo.parse(read("taccinfo-lonestar6.txt"), "TACC"),
        lambda: taccinfo.parse(read("taccinfo-frontera.txt"), "/home1"),
        lambda: slurm.parse(read("assoc_mgr-limited-qos.txt"), "account"),
        lambda: slurm.parse(read("assoc_mgr-unlimited.txt"), "account1"),
        lambda: slurm.parse("No associations currently cached in Slurm.", "account1"),
    ],
)
def test_project_that_is_not_there_is_not_guessed(parse: Callable[[], Balance]) -> None:
    with pytest.raises(BalanceUnavailable, match="no allocation of"):
        parse()


def test_account_that_nothing_limits_has_no_balance() -> None:
    with pytest.raises(BalanceUnavailable, match="nothing to run out of"):
        slurm.parse(read("assoc_mgr-unlimited.txt"), "guests")
    with pytest.raises(BalanceUnavailable, match="nothing to run out of"):
        mybalance.parse(read("mybalance-roar.txt"), "open")
    with pytest.raises(BalanceUnavailable, match="nothing to run out of"):
        mybalance.parse(read("mybalance-anvil.txt"), "child")


@pytest.mark.parametrize("output", ["", "Project Balance\nbiology 324817276\n"])
def test_another_centres_command_of_the_same_name_is_not_believed(output: str) -> None:
    with pytest.raises(BalanceUnavailable, match="has not the columns"):
        mybalance.parse(output, "biology")


def test_the_least_of_several_limits_counts() -> None:
    limited = read("assoc_mgr-unlimited.txt").replace("billing=N(1873117)", "billing=1200(600)")
    qos = read("assoc_mgr-limited-qos.txt").replace("accounta\n", "guests\n")
    assert slurm.parse(limited + qos, "guests").available == 10
    assert slurm.parse(limited, "guests").used == 10


# ---- sreport -------------------------------------------------------------------------------------

COUNTING = read("config-local-slurm.txt").replace("7-00:00:00", "00:00:00")
"""As the rig has it, without decay."""
TOLD = {
    # A quality of service is shown to everybody, with those it counts.
    "assoc_mgr": read("assoc_mgr-limited-qos.txt")
    .replace("billing=1000(0)", "billing=N(0)")
    .replace("accounta", "astro"),
    "config": COUNTING.replace("= NONE", "= YEARLY"),
    "assoc": "billing=6000,cpu=9000\n",
    "sreport": read("sreport-local-slurm.txt"),
}
SLURM = """
told = {told!r}
with open({log!r}, "a") as log:
    print(*sys.argv, file=log)
print(next(told[word] for word in (*sys.argv[2:], "sreport") if word in told), end="")
"""


@pytest.fixture
def hiding(install: Callable[[str, str], None], tmp_path: Path) -> Callable[..., list[str]]:
    """Install a Slurm whose controller shows no account; return what its commands are asked."""

    def hide(**changes: str) -> list[str]:
        for name in ("scontrol", "sacctmgr", "sreport"):
            install(name, SLURM.format(told={**TOLD, **changes}, log=str(tmp_path / "asked")))
        return asked()

    def asked() -> list[str]:
        log = tmp_path / "asked"
        return log.read_text().splitlines() if log.exists() else []

    return hide


async def test_an_account_that_the_controller_hides_is_summed_by_sreport(
    hiding: Callable[..., list[str]],
) -> None:
    hiding()
    balance = await SlurmBalance().balance("astro")
    assert (balance.unit, balance.granted) == ("billing hours", Decimal(100))
    # With the account below it: the users' own 10 and 5 minutes, and 16 there.
    assert (balance.used, balance.available) == (Decimal(31) / 60, Decimal(5969) / 60)
    assert balance.as_of == datetime(2026, 11, 22, 5).astimezone(UTC)
    asked = hiding()[-1]
    year = datetime.now().astimezone().year
    assert f"Accounts=astro Start={year}-01-01 End=now" in asked


async def test_an_account_without_a_row_has_used_nothing(
    hiding: Callable[..., list[str]],
) -> None:
    hiding(assoc="cpu=60\n")
    balance = await SlurmBalance(tres="cpu").balance("nova")
    assert (balance.used, balance.available) == (Decimal(0), Decimal(1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"assoc": ""}, r"cluster=rig account=astro.* no allocation of 'astro'"),
        ({"assoc": "\n"}, "no GrpTRESMins of its own limits the billing of 'astro'"),
        ({"assoc": "cpu=60\n"}, "no GrpTRESMins of its own limits the billing of 'astro'"),
        ({"config": read("config-local-slurm.txt")}, "halved every 7-00:00:00"),
        ({"config": COUNTING}, r"PriorityUsageResetPeriod is NONE.*since: 2026-10-01"),
        ({"sreport": "sreport: fatal"}, "no report of AccountUtilizationByUser"),
    ],
)
async def test_what_sreport_cannot_tell_is_not_guessed(
    hiding: Callable[..., list[str]], changes: dict[str, str], said: str
) -> None:
    hiding(**changes)
    with pytest.raises(BalanceUnavailable, match=said):
        await SlurmBalance().balance("astro")


async def test_a_site_file_says_since_when_usage_counts(hiding: Callable[..., list[str]]) -> None:
    hiding(config=COUNTING)
    source = get_balance_source(with_balance(kind="slurm", since="2026-10-01"))
    assert (await source.balance("astro")).granted == 100
    assert "Start=2026-10-01 End=now" in hiding()[-1]
    with pytest.raises(ValidationError, match="the kind slurm alone takes it"):
        with_balance(kind="accounts", since="2026-10-01")


@pytest.mark.parametrize(
    ("period", "start"),
    [
        ("DAILY", "2026-11-22"),
        ("WEEKLY", "2026-11-22"),
        ("MONTHLY", "2026-11-01"),
        ("QUARTERLY", "2026-10-01"),
        ("YEARLY", "2026-01-01"),
    ],
)
def test_usage_counts_since_slurm_reset_it(period: str, start: str) -> None:
    config = {"PriorityUsageResetPeriod": period}
    assert sreport.get_start(config, date(2026, 11, 22)) == date.fromisoformat(start)


def test_a_week_begins_on_sunday_as_slurms_does() -> None:
    config = {"PriorityUsageResetPeriod": "WEEKLY"}
    starts = {sreport.get_start(config, date(2026, 11, day)) for day in range(15, 22)}
    assert starts == {date(2026, 11, 15)}


def test_two_balances_of_one_project_are_refused() -> None:
    twice = read("showusage.txt") + read("showusage.txt").replace("19873.7", "3.0")
    with pytest.raises(BalanceUnavailable, match="2 different"):
        showusage.parse(twice, "abc123")
    with pytest.raises(BalanceUnavailable, match="tells 2 balances of 'spent'"):
        mybalance.parse(read("mybalance-anvil.txt"), "spent")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a program on the path that does what a line of Python says."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!{sys.executable} -IS\nimport sys, time\n{body}\n")
        path.chmod(0o755)

    return put


def source_of(site: str) -> BalanceSource:
    return get_balance_source(load_site(find_site(site)), token="secret")


async def test_command_gets_the_project_as_one_argument(
    install: Callable[[str, str], None],
) -> None:
    text = read("sbank-polaris.txt")
    wanted = ["-p", "neutrinoGPU", "-r", "polaris"]
    install("sbank-list-allocations", f"assert sys.argv[1:] == {wanted}\nprint({text!r})")
    balance = await source_of("alcf-polaris").balance("neutrinoGPU")
    assert balance.available == Decimal("-394.1")


async def test_failing_command_is_told_with_what_it_said(
    install: Callable[[str, str], None],
) -> None:
    install("accounts", "sys.exit('the database is down')")
    with pytest.raises(
        BalanceUnavailable, match=r"'accounts'.* 1 .*the database is down"
    ) as caught:
        await source_of("ncsa-delta").balance("abcd-delta-gpu")
    assert caught.value.detail["command"] == "accounts"


async def test_silent_command_is_ended(install: Callable[[str, str], None], tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    install(
        "accounts", f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    source = CommandBalance(command=accounts.COMMAND, parse=accounts.parse, timeout_s=1.5)
    with pytest.raises(BalanceUnavailable, match=r"did not answer in 1.5 s.*later"):
        await source.balance("abcd-delta-gpu")
    if pid.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


async def test_missing_command_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BalanceUnavailable, match="login node"):
        await SlurmBalance().balance("phys")


@pytest.mark.parametrize("project", ["", "-x", "a b", "a;b", "a" * 65, "../etc", "a\n"])
async def test_name_that_is_no_project_is_never_run(project: str) -> None:
    with pytest.raises(RequestInvalid, match="project"):
        await source_of("alcf-polaris").balance(project)
    with pytest.raises(RequestInvalid, match="project"):
        await FacilityBalance(url="http://127.0.0.1:1", token="t").balance(project)


class Facility(BaseHTTPRequestHandler):
    """Answers as the reference implementation of the API does."""

    answers: dict[str, tuple[int, str]] = {}

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, "{}"))
        if self.headers["Authorization"] != "Bearer secret":
            status, body = 401, "{}"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def facility() -> Iterator[str]:
    prefix = "/api/v2/account/projects"
    Facility.answers = {
        prefix: (200, read("iri-projects.json")),
        f"{prefix}/proj-abc123/project_allocations": (200, read("iri-allocations.json")),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Facility)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/api/v2"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("project", ["Climate-Simulation", "proj-abc123"])
@pytest.mark.parametrize("capability", [None, "gpu"])
async def test_facility_tells_compute_and_not_storage(
    facility: str, project: str, capability: str | None
) -> None:
    source = FacilityBalance(url=facility, token="secret", capability=capability)
    balance = await source.balance(project)
    assert (balance.unit, balance.granted, balance.used, balance.available) == (
        *("node-hours", Decimal(100000), Decimal("52342.5"), Decimal("47657.5")),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token": "old"}, r"401.*new token"),
        ({"url": "/nowhere"}, r"404"),
        ({"url": "http://127.0.0.1:1"}, r"cannot be reached \(ConnectError\)"),
        ({"capability": "cpu"}, "no allocation of"),
    ],
)
async def test_facility_that_does_not_tell_is_named(
    facility: str, change: dict[str, str], said: str
) -> None:
    if change.get("url", "").startswith("/"):
        change = {"url": facility + change["url"]}
    source = replace(FacilityBalance(url=facility, token="secret"), **change)  # type: ignore[arg-type]
    with pytest.raises(BalanceUnavailable, match=said):
        await source.balance("proj-abc123")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<html>", "not of the known form"),
        ('[{"id": "a"}]', "entries"),
        (
            '[{"id": "a", "capability_uri": "x/gpu", "entries": [%s]},'
            ' {"id": "b", "capability_uri": "x/cpu", "entries": [%s]}]'
            % (2 * ('{"allocation": 1, "usage": 0, "unit": "node_hours"}',)),
            r"2 compute allocations; .*gpu, cpu",
        ),
    ],
)
async def test_facility_answer_that_is_not_clear_is_refused(
    facility: str, answer: str, said: str
) -> None:
    path = "/api/v2/account/projects/proj-abc123/project_allocations"
    Facility.answers = {**Facility.answers, path: (200, answer)}
    with pytest.raises(BalanceUnavailable, match=said):
        await FacilityBalance(url=facility, token="secret").balance("proj-abc123")


@pytest.mark.parametrize(
    ("site", "name", "recorded", "project", "available"),
    [
        ("ncsa-delta", "accounts", "accounts-delta", "bbka-delta-gpu", 5_000_000),
        ("purdue-anvil", "mybalance", "mybalance-anvil", "astro", Decimal("149.5")),
        ("olcf-frontier", "showusage", "showusage", "ABC123", Decimal("19873.7")),
    ],
)
async def test_site_file_names_the_command(
    install: Callable[[str, str], None],
    site: str,
    name: str,
    recorded: str,
    project: str,
    available: int | Decimal,
) -> None:
    install(name, f"assert not sys.argv[1:]\nprint({read(recorded + '.txt')!r})")
    assert (await source_of(site).balance(project)).available == available


def test_site_file_names_what_is_no_command_on_the_path() -> None:
    frontera = source_of("tacc-frontera")
    assert isinstance(frontera, CommandBalance)
    assert (frontera.command, frontera.parse) == (taccinfo.COMMAND, taccinfo.parse)
    assert isinstance(source_of("nersc-perlmutter"), FacilityBalance)


def with_balance(**balance: Any) -> SiteSpec:
    fields = load_site(find_site("local-slurm")).model_dump(mode="json", exclude_defaults=True)
    fields["system"]["charge"] = {"unit": "core hour", "balance": balance}
    return SiteSpec.model_validate(fields)


async def test_a_users_own_file_may_name_mybalance(install: Callable[[str, str], None]) -> None:
    install("mybalance", f"print({read('mybalance-roar.txt')!r})")
    source = get_balance_source(with_balance(kind="mybalance"))
    assert (await source.balance("dml129-engagement")).used == Decimal("11530.7")


def test_site_without_a_source_says_what_to_run_by_hand() -> None:
    with pytest.raises(SettingInvalid, match="`lumi-allocations`"):
        get_balance_source(load_site(find_site("eurohpc-lumi")))
    with pytest.raises(SettingInvalid, match="does not say"):
        get_balance_source(SiteSpec(name="lab"))
    with pytest.raises(SettingInvalid, match="token"):
        get_balance_source(load_site(find_site("nersc-perlmutter")))


async def test_output_that_is_not_text_is_read(install: Callable[[str, str], None]) -> None:
    install("garbled", "sys.stdout.buffer.write(bytes(range(256)))")
    assert "abc" in await command.ask("garbled")


def test_token_is_not_shown() -> None:
    assert "secret" not in repr(
        FacilityBalance(url="https://iri.example.org/api/v2", token="secret")
    )
