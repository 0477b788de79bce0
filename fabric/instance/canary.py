"""The canary: an instance is ready only after its engine has really computed something."""

from __future__ import annotations

import asyncio

from fabric.engine.interface import Engine
from fabric.errors import CanaryFailed
from fabric.messages import (
    EMBED_SAMPLING,
    Embedding,
    Event,
    Failed,
    Finished,
    Request,
    Sampling,
    Task,
    TextInput,
    Token,
    new_id,
)

PROMPT = "The quick brown fox"
SAMPLING = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=0)
TIMEOUT_S = 120.0


async def sing(engine: Engine, model: str) -> None:
    """Generate a few tokens greedily through the engine, or embed if that is all it does.

    Raises:
        CanaryFailed: It failed, ended without a token, or took more than two minutes.
    """
    generates = "query" in engine.info.limits.modes
    request = Request(
        id=new_id("canary"),
        mode="query" if generates else "embed",
        model=model,
        input=TextInput(text=PROMPT),
        sampling=SAMPLING if generates else EMBED_SAMPLING,
        deadline_s=TIMEOUT_S,
    )
    task = Task(
        id=request.id,
        attempt=1,
        request=request,
        digest=engine.info.digest,
        deadline_s=TIMEOUT_S,
    )
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def sink(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    engine.submit(task, sink)
    num_results = 0
    try:
        async with asyncio.timeout(TIMEOUT_S + 5.0):
            while not isinstance(event := await events.get(), Finished):
                if isinstance(event, Failed):
                    raise CanaryFailed(model=model, reason=event.failure.message.rstrip("."))
                # Neither may hold NaN or an infinity: the wire form refuses that.
                num_results += isinstance(event, Embedding)
                num_results += isinstance(event, Token) and event.logprob is not None
    except TimeoutError as error:
        engine.cancel(task.id, task.attempt)
        raise CanaryFailed(model=model, reason=f"no answer in {TIMEOUT_S:g} s") from error
    if num_results == 0:
        what = "token" if generates else "embedding"
        raise CanaryFailed(model=model, reason=f"it generated no {what}")
