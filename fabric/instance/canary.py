"""The canary: an instance is ready only after its engine has really generated something."""

from __future__ import annotations

import asyncio

from fabric.engine.interface import Engine
from fabric.errors import CanaryFailed
from fabric.messages import (
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
NUM_TOKENS = 4
TIMEOUT_S = 120.0


async def sing(engine: Engine, model: str) -> None:
    """Generate a few tokens greedily through the engine.

    Raises:
        CanaryFailed: It failed, ended without a token, or took more than two minutes.
    """
    request = Request(
        id=new_id("canary"),
        model=model,
        input=TextInput(text=PROMPT),
        sampling=Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0),
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
    num_tokens = 0
    try:
        async with asyncio.timeout(TIMEOUT_S + 5.0):
            while not isinstance(event := await events.get(), Finished):
                if isinstance(event, Failed):
                    raise CanaryFailed(model=model, reason=event.failure.message.rstrip("."))
                # A token's log probability cannot be NaN or infinite: its wire form refuses that.
                num_tokens += isinstance(event, Token) and event.logprob is not None
    except TimeoutError as error:
        engine.cancel(task.id, task.attempt)
        raise CanaryFailed(model=model, reason=f"no answer in {TIMEOUT_S:g} s") from error
    if num_tokens == 0:
        raise CanaryFailed(model=model, reason="it generated no token")
