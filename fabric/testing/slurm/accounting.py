"""slurmdbd over a MariaDB of its own: accounts, users, and limits in service units."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from fabric.errors import SettingInvalid
from fabric.testing.guarded import Guarded
from fabric.testing.ports import free_port

START_TIMEOUT_S = 120.0

CONFIG = """\
AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
StoragePort={database_port}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


@dataclass(slots=True, kw_only=True)
class Accounting:
    """The accounts of one cluster.

    Attributes:
        directory: Everything it writes; munge's socket is in its parent.
    """

    directory: Path
    port: int = field(default_factory=free_port)
    _database: Guarded | None = field(default=None, init=False)
    _daemon: Guarded | None = field(default=None, init=False)

    def get_cluster_config(self) -> str:
        """Return what the cluster's ``slurm.conf`` says of its accounts."""
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            "AccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={self.port}\n"
            f"AccountingStoragePass={self.directory.parent / 'munge.sock'}\n"
            "AccountingStorageEnforce=associations,limits,qos,safe\n"
            "PriorityType=priority/multifactor\n"
            "PriorityDecayHalfLife=0\n"
            "PriorityUsageResetPeriod=YEARLY\n"
            "PrivateData=usage\n"
        )

    def start(self) -> None:
        """Start the database and its daemon; munge must run.

        Raises:
            SettingInvalid: One of them is not installed.
            TimeoutError: One of them does not come up.
        """
        server, daemon = _find("mariadbd"), _find("slurmdbd")
        data = self.directory / "data"
        data.mkdir(parents=True)
        log = self.directory / "mariadb.log"
        user = ["--user=root"] if os.geteuid() == 0 else []
        with log.open("ab") as output:
            subprocess.run(
                [
                    *(_find("mariadb-install-db"), "--no-defaults", f"--datadir={data}"),
                    *("--skip-test-db", "--auth-root-authentication-method=normal", *user),
                ],
                stdout=output,
                stderr=output,
                check=True,
            )
        database_port, password = free_port(), secrets.token_hex(16)
        socket = self.directory / "m.sock"
        self._database = Guarded(
            [
                *(server, "--no-defaults", f"--datadir={data}", *user),
                *(f"--socket={socket}", f"--port={database_port}", "--bind-address=127.0.0.1"),
                *("--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"),
            ],
            log,
        )
        client = [_find("mariadb"), "--no-defaults", f"--socket={socket}", "-u", "root"]
        self._wait("MariaDB", [*client, "-e", "SELECT 1"])
        grant = (
            f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';"
            " GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';"
        )
        subprocess.run([*client, "-e", grant], check=True, capture_output=True)
        config = self.directory / "slurmdbd.conf"
        config.write_text(
            CONFIG.format(
                munge=self.directory.parent / "munge.sock",
                port=self.port,
                user="root" if os.geteuid() == 0 else os.environ["USER"],
                password=password,
                database_port=database_port,
                folder=self.directory,
            )
        )
        config.chmod(0o600)
        environ = os.environ | {"SLURM_CONF": str(self.directory.parent / "slurm.conf")}
        # slurmdbd reads slurmdbd.conf beside the slurm.conf that it is told of.
        (self.directory.parent / "slurmdbd.conf").symlink_to(config)
        self._daemon = Guarded([daemon, "-D"], self.directory / "slurmdbd.out", environ)
        self._wait("slurmdbd", [_find("sacctmgr"), "-n", "list", "cluster"], environ)

    def close(self) -> None:
        """End both at once."""
        for process in (self._daemon, self._database):
            if process is not None:
                process.kill()

    def _wait(self, what: str, command: list[str], environ: dict[str, str] | None = None) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while (
            tried := subprocess.run(
                command, capture_output=True, env=environ, text=True, check=False
            )
        ).returncode:
            if time.monotonic() > until:
                logs = [log.read_text(errors="replace")[-1500:] for log in self._logs()]
                logs.insert(0, tried.stderr)
                raise TimeoutError(f"{what} did not come up within {START_TIMEOUT_S} s: {logs}")
            time.sleep(0.1)

    def _logs(self) -> list[Path]:
        return sorted(self.directory.glob("*.log")) + sorted(self.directory.glob("*.out"))


def _find(program: str) -> str:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/bin")
    if found is None:
        raise SettingInvalid(
            setting=program,
            value=program,
            reason="it is not installed; run `apt-get install slurmdbd mariadb-server`",
        )
    return found
