"""The vLLM server: started on loopback and ended with its owner, or one that runs already."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import httpx
from torch import Tensor

from fabric.engine.config import EngineConfig
from fabric.engine.vllm.command import get_command, get_runner
from fabric.engine.vllm.embeddings import get_body, read_vector
from fabric.engine.vllm.protocol import ROUTES
from fabric.errors import BackendFailed, ModelNotLoadable
from fabric.messages import VllmOptions

_logger = getLogger(__name__)

_POLL_S = 0.2
_STOP_S = 10.0
"""How long a server that was asked to end may take."""

_NUM_PORTS = 3
"""Ports that are tried one after the other."""

_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server says of itself; ``context_tokens`` is its longest row."""

    version: str
    served_name: str
    context_tokens: int


class VllmServer:
    """A vLLM server that speaks the OpenAI API.

    Args:
        options: Its command, or where it runs.
        path: The directory of the model's files.
        config: The limits it is started with.
        name: What errors call the model.
    """

    def __init__(
        self, options: VllmOptions, *, path: Path, config: EngineConfig, name: str
    ) -> None:
        self._options = options
        self._path = path
        self._config = config
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._key = ""
        self._port = 0
        self.url = options.url or ""
        """Its address, without a path."""

    @property
    def headers(self) -> dict[str, str]:
        """What every request to it carries."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def start(self) -> ServerInfo:
        """Start it, or reach it, and wait until it is healthy.

        Raises:
            ModelNotLoadable: It ended, did not become healthy in time, or serves another model.
        """
        if self._options.url is None:
            return self._start_own()
        if self._options.key_path is not None:
            try:
                self._key = Path(self._options.key_path).expanduser().read_text().strip()
            except OSError as error:
                raise self._refusal(f"its key cannot be read ({error})") from error
        return self._reach()

    def _start_own(self) -> ServerInfo:
        # It binds its port itself, seconds after the port was seen to be free.
        for _ in range(_NUM_PORTS - 1):
            self._spawn()
            try:
                return self._reach()
            except ModelNotLoadable:
                if self.how_it_ended() is None:
                    raise
                if (meeting := self._config.rendezvous) and _is_taken(*_split(meeting)):
                    raise self._refusal(
                        f"{meeting}, where its nodes should meet, was taken by another process;"
                        " launch it again"
                    ) from None
                if not _is_taken("127.0.0.1", self._port):
                    raise
                _logger.warning("port %d was taken meanwhile, another is tried", self._port)
                self.close()
        self._spawn()
        return self._reach()

    def _reach(self) -> ServerInfo:
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=10.0) as http:
            self._wait_healthy(http)
            return self._describe(http)

    def how_it_ended(self) -> str | None:
        """Return how the process ended that was started here; ``None`` while it runs."""
        code = self._process.poll() if self._process else None
        return None if code is None else f"its vLLM server ended with code {code}"

    def close(self) -> None:
        """End the process that was started here and all its own. Calling it twice is harmless."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        # The guard passes this on, waits, and kills what is left of the server's group.
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        self._process.stdin.close()
        self._process.wait()

    def _spawn(self) -> None:
        self._key = secrets.token_urlsafe(32)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        config = self._config
        command = get_command(
            self._options, config, path=self._path, name=self._name, port=self._port
        )
        threads = {"OMP_NUM_THREADS": str(config.num_threads)} if config.num_threads else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fabric.engine.vllm.guard", *command],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL,
            # The key is not an argument, which everybody on the node could read.
            env={**os.environ, **_OFFLINE, **threads, "VLLM_API_KEY": self._key},
        )

    def _wait_healthy(self, http: httpx.Client) -> None:
        until = time.monotonic() + self._options.start_s
        pause = threading.Event()
        reason = "it did not answer"
        while time.monotonic() < until:
            if (ended := self.how_it_ended()) is not None:
                raise self._refusal(f"{ended} while it started; its log is the instance's")
            try:
                status = http.get("/health").status_code
                if status == httpx.codes.OK:
                    return
                reason = f"it answered {status}"
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            pause.wait(_POLL_S)
        raise self._refusal(
            f"its vLLM server was not healthy after {self._options.start_s:g} s ({reason})"
        )

    def _describe(self, http: httpx.Client) -> ServerInfo:
        try:
            models = http.get("/v1/models").raise_for_status().json()["data"]
            version = http.get("/version").raise_for_status().json()["version"]
            [model] = [one for one in models if one["id"] == self._name or one["root"] == one["id"]]
            root, context_tokens = Path(model["root"]), int(model["max_model_len"])
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise self._refusal(
                f"what its vLLM server says of its models cannot be read ({error!r})"
            ) from error
        if root.resolve() != self._path.resolve():
            raise self._refusal(f"its vLLM server serves {root} and not {self._path}")
        info = ServerInfo(
            version=str(version), served_name=str(model["id"]), context_tokens=context_tokens
        )
        self._check_route(http)
        return info

    def _check_route(self, http: httpx.Client) -> None:
        """Refuse a server that does something else with prompts: it lacks the route."""
        runner = get_runner(self._options, self._path)
        try:
            status = http.post(ROUTES[runner], json={}).status_code
        except httpx.HTTPError as error:
            raise self._refusal(f"its vLLM server fell silent ({error!r})") from error
        if status == httpx.codes.NOT_FOUND:
            raise self._refusal(
                f"its vLLM server has no {ROUTES[runner]}; start it with --runner {runner}, or say"
                " in the site's options what it does (vllm.runner)"
            )

    def embed(self, ids: Sequence[int], served_name: str, *, dimensions: int) -> Tensor:
        """Return the vector [H] of one prompt, in float32.

        Raises:
            ModelNotLoadable: The server gives none.
        """
        body = get_body(ids, served_name, salt=secrets.token_hex(8))
        try:
            with httpx.Client(
                base_url=self.url, headers=self.headers, timeout=self._options.start_s
            ) as http:
                reply = http.post(ROUTES["pooling"], json=body).raise_for_status().json()
            return read_vector(reply, num_tokens=len(ids), dimensions=dimensions)
        except (httpx.HTTPError, ValueError, BackendFailed) as error:
            raise self._refusal(f"its vLLM server embeds no prompt ({error})") from error

    def _refusal(self, reason: str) -> ModelNotLoadable:
        return ModelNotLoadable(model=self._name, reason=reason)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _is_taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _has_descriptor() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):  # a test's capture
        return False
    return True
