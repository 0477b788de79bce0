"""A hub on a real socket that answers what a test tells it to, faults included."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OURS: Mapping[str, Any] = {
    "run": "run_1",
    "site": "alpha",
    "instance": "inst_1",
    "digest": "blake3:00",
    "model": "toy@1",
    "attempts": 1,
    "reason": "lowest expected cost",
    "charge_usu": 420,
    "first_token_s": 0.5,
    "total_s": 1.5,
}
"""The ``fabric`` object of every answer."""

USAGE: Mapping[str, Any] = {"prompt_tokens": 3, "completion_tokens": 11, "total_tokens": 14}

Answer = Callable[[BaseHTTPRequestHandler], None]


class ScriptedHub(ThreadingHTTPServer):
    """Gives the answers it was told, in order, and the last one again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: deque[Answer] = deque()
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.server_port}"

    def play(self, *answers: Answer) -> None:
        """Answer with these from now on."""
        self.script = deque(answers)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedHub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        hub = self.server
        length = int(self.headers.get("content-length", 0))
        hub.paths.append(self.path)
        hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        hub.bodies.append(json.loads(self.rfile.read(length) or b"{}"))
        (hub.script.popleft() if len(hub.script) > 1 else hub.script[0])(self)


def reply(body: object, status: int = 200, **headers: str) -> Answer:
    """Return an answer of JSON; underscores in header names stand for hyphens."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def refusal(code: str, message: str, status: int, **headers: str) -> Answer:
    """Return an error in OpenAI's shape."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    return reply({"error": error}, status, **headers)


def completion(text: str = "four") -> Answer:
    """Return a completion."""
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
    return reply({"model": "toy", "choices": [choice], "usage": USAGE, "fabric": OURS})


def chat_completion(text: str = "four") -> Answer:
    """Return a chat completion."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return reply({"model": "toy", "choices": [choice], "usage": USAGE, "fabric": OURS})


def events(*chunks: object, done: bool = True, then: Answer | None = None) -> Answer:
    """Return server-sent events; the connection closes after them, and after ``then``."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if done:
            handler.wfile.write(b"data: [DONE]\n\n")
        handler.wfile.flush()
        if then:
            then(handler)
        handler.close_connection = True

    return answer


def chat_events(*texts: str, done: bool = True, then: Answer | None = None) -> Answer:
    """Return a streamed chat completion of these pieces."""
    first = {name: OURS[name] for name in ("run", "site", "instance", "reason", "attempts")}
    chunks: list[object] = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        for text in texts
    ]
    opening = {"choices": [{"index": 0, "delta": {"role": "assistant"}}], "fabric": first}
    ending = [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"model": "toy", "choices": [], "usage": USAGE, "fabric": OURS},
    ]
    return events(opening, *chunks, *(ending if done else ()), done=done, then=then)


def wait_for_client_to_leave(handler: BaseHTTPRequestHandler) -> None:
    """Say nothing until the client closes its connection, and note that it did."""
    handler.connection.settimeout(20)
    if handler.connection.recv(1) == b"":
        assert isinstance(handler.server, ScriptedHub)
        handler.server.client_left.set()
    handler.close_connection = True


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


@contextmanager
def scripted_hub() -> Iterator[ScriptedHub]:
    """Yield a scripted hub that serves until the end of the block."""
    with ScriptedHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
