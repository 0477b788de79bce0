"""An answer that arrives token by token."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fabric.errors import FabricError
from fabric.sdk.background import BackgroundLoop
from fabric.sdk.results import Chunk, Completion, Json, merge_calls, merge_logprobs

if TYPE_CHECKING:
    import httpx

_NOT_COMPLETE = "it ended without saying that it was complete"


class AsyncStream:
    """The chunks of one answer. Closing it before its end cancels the request on the hub.

    Args:
        response: The open response; the stream owns it from now on.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._events = _read_events(response)
        self._ready: deque[Chunk] = deque()
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[Json]] = defaultdict(list)
        self._calls: defaultdict[int, list[Json]] = defaultdict(list)
        self._finish_reasons: dict[int, str] = {}
        self._fabric: dict[str, Any] = {}
        self._usage: Json = {}
        self._model = ""
        self._num_chunks = 0
        self._complete = False

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return "".join(self._texts[0])

    @property
    def site(self) -> str | None:
        """Where it is being computed; known from the first chunk on."""
        return self._fabric.get("site")

    @property
    def reason(self) -> str | None:
        """Why that site was chosen; known from the first chunk on."""
        return self._fabric.get("reason")

    @property
    def result(self) -> Completion:
        """The whole answer, once the stream has ended.

        Raises:
            RuntimeError: It has not ended, or was closed or broken before its end.
        """
        if not self._complete:
            raise RuntimeError("The stream has no result yet; read it to its end first.")
        choices = [
            {
                "text": "".join(self._texts[index]),
                "finish_reason": reason,
                "logprobs": merge_logprobs(self._logprobs[index]),
                "tool_calls": merge_calls(self._calls[index]),
            }
            for index, reason in sorted(self._finish_reasons.items())
        ]
        return Completion.from_reply(
            {
                "model": self._model,
                "choices": choices,
                "usage": self._usage,
                "fabric": self._fabric,
            }
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self.read()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def read(self) -> Chunk | None:
        """Return the next chunk, or ``None`` at the end.

        Raises:
            FabricError: The hub ended the run with an error.
            StreamBroken: The connection ended before the answer did.
        """
        while not self._ready:
            data = await self._next_data()
            if data is None:
                return None
            self._take(json.loads(data))
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Close the connection, which cancels what is not done. Twice is harmless."""
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def _next_data(self) -> str | None:
        import httpx

        cause = _NOT_COMPLETE
        try:
            async for data in self._events:
                if data != "[DONE]":
                    return data
                self._complete = True
        except (httpx.TransportError, httpx.StreamError) as error:
            cause = str(error).rstrip(".") or type(error).__name__
        await self.aclose()
        if self._complete:
            return None
        raise broken(self._num_chunks, cause)

    def _take(self, reply: Json) -> None:
        if "error" in reply:
            from fabric.sdk.transport import read_error

            raise read_error(reply)
        self._model = reply.get("model") or self._model
        self._usage = reply.get("usage") or self._usage
        ours = reply.get("fabric") or {}
        self._fabric |= ours
        because = ours.get("because")
        for choice in reply.get("choices") or ():
            self._take_choice(choice, because)
            because = None

    def _take_choice(self, choice: Json, because: str | None) -> None:
        index = choice.get("index", 0)
        delta = choice.get("delta")
        text = (choice.get("text") if delta is None else delta.get("content")) or ""
        finish_reason = choice.get("finish_reason")
        logprobs = choice.get("logprobs")
        self._texts[index].append(text)
        self._calls[index] += (delta or {}).get("tool_calls") or ()
        if finish_reason:
            self._finish_reasons[index] = finish_reason
        if logprobs:
            self._logprobs[index].append(logprobs)
        if text or finish_reason or logprobs or because:
            self._num_chunks += 1
            self._ready.append(
                Chunk(
                    text=text,
                    choice=index,
                    finish_reason=finish_reason,
                    logprobs=logprobs,
                    because=because,
                )
            )


async def read_replies(response: httpx.Response) -> AsyncGenerator[Json, None]:
    """Yield what the hub streams up to ``[DONE]``; the response is closed in any case.

    Raises:
        FabricError: The hub ended the run with an error.
        StreamBroken: The connection ended before the answer did.
    """
    import httpx

    from fabric.sdk.transport import read_error

    num_replies, cause = 0, _NOT_COMPLETE
    try:
        async for data in _read_events(response):
            if data == "[DONE]":
                return
            reply = json.loads(data)
            if "error" in reply:
                raise read_error(reply)
            num_replies += 1
            yield reply
    except (httpx.TransportError, httpx.StreamError) as error:
        cause = str(error).rstrip(".") or type(error).__name__
    finally:
        await response.aclose()
    raise broken(num_replies, cause)


def broken(num_chunks: int, cause: str) -> FabricError:
    """Return the error of a stream that ended too early."""
    return FabricError.rebuild(
        "stream_broken",
        f"The hub's stream broke after {num_chunks} chunk(s) ({cause}); what arrived is not the"
        " whole answer. Send it again.",
        {"num_chunks": num_chunks, "cause": cause},
    )


async def _read_events(response: httpx.Response) -> AsyncIterator[str]:
    from httpx_sse import EventSource

    async for event in EventSource(response).aiter_sse():
        yield event.data


class Stream(Iterator[Chunk]):
    """``AsyncStream`` for code that blocks."""

    def __init__(self, stream: AsyncStream, background: BackgroundLoop) -> None:
        self._stream = stream
        self._background = background

    @property
    def text(self) -> str:
        """The first choice's text so far."""
        return self._stream.text

    @property
    def site(self) -> str | None:
        """Where it is being computed; known from the first chunk on."""
        return self._stream.site

    @property
    def reason(self) -> str | None:
        """Why that site was chosen; known from the first chunk on."""
        return self._stream.reason

    @property
    def result(self) -> Completion:
        """The whole answer, once the stream has ended; raises as ``AsyncStream.result`` does."""
        return self._stream.result

    def __next__(self) -> Chunk:
        chunk = self._background.run(self._stream.read())
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Close the connection, which cancels what is not done. Twice is harmless."""
        self._background.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left with ``break`` must not keep a row busy at some site.
        with suppress(Exception):
            self._background.submit(self._stream.aclose())
