"""A RabbitMQ of one's own: random ports on loopback, in one folder, with nothing left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict

from fabric.errors import SettingInvalid
from fabric.testing.guarded import Guarded
from fabric.testing.ports import free_port

# The server itself: the one on Debian's PATH wants to be root and switches accounts.
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
CONFIG = """\
listeners.tcp.local = 127.0.0.1:{amqp}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
management_agent.disable_metrics_collector = true
loopback_users = none
default_user = {user}
default_pass = {password}
vm_memory_high_watermark.absolute = 8GB
disk_free_limit.absolute = 1MB
log.console.level = error
log.file.level = warning
"""


class BrokerAddress(BaseModel):
    """Where a broker is and who administers it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amqp_port: int
    management_port: int
    user: str
    password: str

    def amqp_url(self, user: str | None = None, password: str | None = None) -> str:
        """Return the URL of an account, the administrator's when none is named."""
        account = f"{user or self.user}:{password or self.password}"
        return f"amqp://{account}@127.0.0.1:{self.amqp_port}/%2F"

    @property
    def management_url(self) -> str:
        """The management API."""
        return f"http://127.0.0.1:{self.management_port}/api"


@dataclass(slots=True, kw_only=True)
class Rabbit:
    """A RabbitMQ server and the port mapper (epmd) of its own that Erlang wants.

    Attributes:
        directory: Everything it writes.
    """

    directory: Path
    address: BrokerAddress = field(init=False)
    _epmd: Guarded | None = field(default=None, init=False)
    _server: Guarded | None = field(default=None, init=False)
    _environ: dict[str, str] = field(default_factory=dict, init=False)

    def start(self) -> None:
        """Start it, with what an earlier start left; return once it takes accounts.

        Raises:
            SettingInvalid: RabbitMQ is not installed.
            TimeoutError: It does not answer.
        """
        epmd = shutil.which("epmd")
        if epmd is None or not SERVER.exists():
            raise SettingInvalid(
                setting="rabbitmq-server",
                value=SERVER,
                reason="RabbitMQ is not installed; run `apt-get install rabbitmq-server`",
            )
        if not self._environ:
            self._configure()
        log = self.directory / "rabbit.log"
        if self._epmd is None:
            port = self._environ["ERL_EPMD_PORT"]
            self._epmd = Guarded([epmd, "-port", port, "-address", "127.0.0.1"], log)
        self._server = Guarded([str(SERVER)], log, self._environ)
        self._wait_started()

    def stop(self) -> None:
        """Stop the server as an administrator would; queues and durable messages stay."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def close(self) -> None:
        """End everything at once."""
        for process in (self._server, self._epmd):
            if process is not None:
                process.kill()
        self._server = self._epmd = None

    def _configure(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.address = BrokerAddress(
            amqp_port=free_port(),
            management_port=free_port(),
            user="rig",
            password=secrets.token_hex(16),
        )
        config = self.directory / "rabbitmq.conf"
        config.write_text(
            CONFIG.format(
                amqp=self.address.amqp_port,
                management=self.address.management_port,
                user=self.address.user,
                password=self.address.password,
            )
        )
        config.chmod(0o600)
        plugins = self.directory / "enabled_plugins"
        plugins.write_text("[rabbitmq_management].\n")
        self._environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Without a shell around it, so that it gets the signals itself.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_NODENAME": f"rig-{secrets.token_hex(4)}@localhost",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "data"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            # Two schedulers that sleep when idle: test machines are small.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} "
            "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def _wait_started(self) -> None:
        assert self._server is not None
        until = time.monotonic() + START_TIMEOUT_S
        auth = (self.address.user, self.address.password)
        while time.monotonic() < until and self._server.running:
            try:
                url = f"{self.address.management_url}/health/checks/port-listener/"
                answer = httpx.get(
                    f"{url}{self.address.amqp_port}", auth=auth, timeout=10, trust_env=False
                )
                if answer.is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        tail = self._server.log_tail
        self.close()
        raise TimeoutError(f"RabbitMQ did not start within {START_TIMEOUT_S} s: {tail}")


@contextmanager
def running_rabbit(directory: Path) -> Iterator[Rabbit]:
    """Yield a RabbitMQ that keeps everything in ``directory``, and end it."""
    rabbit = Rabbit(directory=directory)
    try:
        rabbit.start()
        yield rabbit
    finally:
        rabbit.close()
