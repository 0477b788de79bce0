"""The peer of ``benchmarks/hub_overhead.py``: LiteLLM's proxy before an upstream of a fixed delay.

LiteLLM runs in an environment of its own (``pip install 'litellm[proxy]'``), one worker, with a
master key and its router's budgets on. Budgets of single keys would need its database client, whose
engine is downloaded from binaries.prisma.sh when it is first used; where that cannot be reached,
what is measured here is less than what LiteLLM does with a database, in its favour.

    python benchmarks/hub_overhead_litellm.py PORT DELAY_S     serves the upstream alone
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvloop
import yaml

from fabric.cli import processes
from fabric.cli.federation import choose_port

HOST = "127.0.0.1"
MODEL = "fixed-delay"
WORDS = [f"word{i} " for i in range(8)]
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Peer:
    """Where LiteLLM and what is behind it listen."""

    upstream_url: str
    proxy_url: str
    api_key: str
    proxy_pid: int


@contextlib.contextmanager
def running_litellm(venv: Path, delay_s: float) -> Iterator[Peer]:
    """Start the upstream and LiteLLM before it, and end both."""
    with tempfile.TemporaryDirectory(prefix="litellm-bench-") as name:
        folder = Path(name)
        upstream, proxy = choose_port(HOST, 0), choose_port(HOST, 0)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(get_config(f"http://{HOST}:{upstream}/v1")))
        records = [
            processes.spawn(
                [sys.executable, __file__, str(upstream), str(delay_s)],
                log_path=folder / "upstream.log",
            ),
            processes.spawn(
                [
                    *(str(venv / "bin/python"), str(venv / "bin/litellm")),
                    *("--config", str(config), "--host", HOST, "--port", str(proxy)),
                    *("--num_workers", "1", "--telemetry", "False"),
                ],
                log_path=folder / "litellm.log",
                environ={
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    "LITELLM_MODE": "PRODUCTION",
                    "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
                },
            ),
        ]
        try:
            _wait(f"http://{HOST}:{upstream}/", folder / "upstream.log")
            _wait(f"http://{HOST}:{proxy}/health/liveliness", folder / "litellm.log")
            yield Peer(
                upstream_url=f"http://{HOST}:{upstream}",
                proxy_url=f"http://{HOST}:{proxy}",
                api_key="sk-bench",
                proxy_pid=records[1].pid,
            )
        finally:
            processes.end(records, grace_s=5)


def get_config(api_base: str) -> dict[str, object]:
    """Return LiteLLM's configuration: one deployment, its price, and a budget that lasts."""
    return {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}",
                    "api_base": api_base,
                    "api_key": "none",
                    "input_cost_per_token": 1e-6,
                    "output_cost_per_token": 4e-6,
                },
            }
        ],
        "router_settings": {
            "provider_budget_config": {"openai": {"budget_limit": 1e6, "time_period": "1d"}}
        },
        "general_settings": {"master_key": "sk-bench"},
    }


def _wait(url: str, log_path: Path) -> None:
    for _ in processes.poll(START_S):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
    raise TimeoutError(f"{url} does not answer: {log_path.read_text()[-2000:]}")


async def serve_upstream(port: int, delay_s: float) -> None:
    """Answer chat completions after a fixed delay, with as little work as can be."""
    usage = {"prompt_tokens": 3, "completion_tokens": len(WORDS), "total_tokens": 3 + len(WORDS)}
    head = {"id": "chatcmpl-1", "created": 1, "model": MODEL}
    choice = {"index": 0, "finish_reason": "stop"}
    message = {"role": "assistant", "content": "".join(WORDS)}
    whole = json.dumps(
        head
        | {"object": "chat.completion", "usage": usage, "choices": [choice | {"message": message}]}
    ).encode()
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(whole)
    ) + whole
    deltas = [
        head
        | {
            "object": "chat.completion.chunk",
            "choices": [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": word},
                    "finish_reason": "stop" if word is WORDS[-1] else None,
                }
            ],
        }
        for word in WORDS
    ]
    lines = [f"data: {json.dumps(delta)}\n\n".encode() for delta in deltas]
    lines.append(b"data: [DONE]\n\n")
    stream = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
        + b"0\r\n\r\n"
    )

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                header = (await reader.readuntil(b"\r\n\r\n")).lower()
                if header.startswith(b"get"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                size = int(header.split(b"content-length: ")[1].split(b"\r\n")[0])
                asked = json.loads(await reader.readexactly(size))
                await asyncio.sleep(delay_s)
                writer.write(stream if asked.get("stream") else answer)
        writer.close()

    server = await asyncio.start_server(serve, HOST, port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve_upstream(int(sys.argv[1]), float(sys.argv[2])))
