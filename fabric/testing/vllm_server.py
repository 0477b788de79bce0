"""``python -m fabric.testing.vllm_server``: vLLM's protocol in front of our own ``TorchEngine``.

It takes the arguments and speaks the routes of vLLM's server that ``fabric.engine.vllm`` uses, as
vLLM 0.32 does; every answer is computed, over several nodes by our own ranks. Where no vLLM can be
installed the backend runs on this.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fabric.engine.config import EngineConfig
from fabric.engine.embedding import EmbeddingEngine
from fabric.engine.interface import Engine
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import (
    EMBED_SAMPLING,
    Embedding,
    Event,
    Failed,
    Finished,
    Pooling,
    PromptScored,
    Request,
    Sampling,
    ScoredToken,
    Task,
    Token,
    TokensInput,
    Usage,
    new_id,
)

VERSION = "0.32.0+stand-in"
_SAME = (
    *("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs"),
    *("ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty"),
)
_POOLINGS: Mapping[str, Pooling] = {"MEAN": "mean", "LAST": "last"}
_KINDS = {"json": ("json_schema", "definition"), "regex": ("regex", "pattern")}


class Server:
    """The routes over one engine.

    Args:
        engine: Started.
        name: What it calls the model.
        root: The model's directory.
        key: What requests must carry.
        pools: Whether it embeds, as vLLM's ``--runner pooling``, and does nothing else.
        kind: How, if not as the engine does.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        root: str,
        key: str,
        pools: bool = False,
        kind: Pooling | None = None,
    ) -> None:
        self._pools = pools
        self._kind = kind
        self._engine = engine
        self._name = name
        self._root = root
        self._key = key

    @property
    def app(self) -> Starlette:
        """The ASGI app."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/version", self.version),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/embeddings", self.embed, methods=["POST"])
                if self._pools
                else Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    async def health(self, _: HttpRequest) -> Response:
        """Say that the engine is up."""
        return Response()

    async def version(self, _: HttpRequest) -> Response:
        """Say which vLLM this stands for."""
        return JSONResponse({"version": VERSION})

    async def metrics(self, _: HttpRequest) -> Response:
        """Tell the gauges that the backend reads."""
        load, limits = self._engine.load(), self._engine.info.limits
        label = f'engine="0",model_name="{self._name}"'
        lines = [
            f"vllm:num_requests_running{{{label}}} {load.num_running}",
            f"vllm:num_requests_waiting{{{label}}} {load.num_waiting}",
            f"vllm:kv_cache_usage_perc{{{label}}} {load.cache_usage}",
            f"vllm:num_preemptions_total{{{label}}} {load.num_preempted}",
            f"vllm:prefix_cache_queries_total{{{label}}} {load.prefix_queried_tokens}",
            f"vllm:prefix_cache_hits_total{{{label}}} {load.prefix_found_tokens}",
            f'vllm:cache_config_info{{block_size="16",{label},'
            f'num_gpu_blocks="{limits.cache_tokens // 16}"}} 1.0',
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def models(self, http: HttpRequest) -> Response:
        """Describe the one model."""
        if (refusal := self._refuse(http)) is not None:
            return refusal
        model = {
            "id": self._name,
            "object": "model",
            "root": self._root,
            "max_model_len": self._engine.info.limits.context_tokens,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, http: HttpRequest) -> Response:
        """Continue token ids, streamed or whole."""
        if (refusal := self._refuse(http)) is not None:
            return refusal
        body = await http.json()
        if (wrong := self._find_wrong(body, "prompt")) is not None:
            return wrong
        if body["n"] > 1 and not body["temperature"]:
            return _error(400, "n must be 1 when using greedy sampling.")
        try:
            task = self._read(body)
        except ValidationError as error:
            return _error(400, str(error))
        answer = _Answer(self._engine, task)
        first = await anext(answer)
        if isinstance(first, Failed):
            return _error(400, first.failure.message)
        if body["stream"]:
            return StreamingResponse(self._stream(answer), media_type="text/event-stream")
        return await self._whole(answer)

    async def embed(self, http: HttpRequest) -> Response:
        """Embed the token ids of one prompt."""
        if (refusal := self._refuse(http)) is not None:
            return refusal
        body = await http.json()
        if (wrong := self._find_wrong(body, "input")) is not None:
            return wrong
        request = Request(
            mode="embed",
            model="m",
            input=TokensInput(ids=body["input"][0]),
            sampling=EMBED_SAMPLING,
            pooling=self._kind,
            deadline_s=86_400.0,
        )
        answer = _Answer(self._engine, self._get_task(request, body))
        async for event in answer:
            match event:
                case Embedding():
                    vector = event.data
                case Failed():
                    return _error(400, event.failure.message)
                case Finished():
                    data = [{"index": 0, "object": "embedding", "embedding": vector}]
                    usage = _usage(event.usage)
                    return JSONResponse({"model": self._name, "data": data, "usage": usage})
        return _error(500, "The engine ended.")

    def _find_wrong(self, body: Mapping[str, Any], prompt: str) -> Response | None:
        if prompt not in body:
            return _error(400, f"body.{prompt}: Field required")
        if body["model"] != self._name:
            return _error(404, f"The model `{body['model']}` does not exist.")
        return None

    def _read(self, body: Mapping[str, Any]) -> Task:
        given = {name: body[name] for name in _SAME if body.get(name) is not None}
        given["prompt_logprobs"] = body.get("prompt_logprobs") is not None
        if given["prompt_logprobs"]:
            given.setdefault("logprobs", body["prompt_logprobs"])
        for kind, value in (body.get("structured_outputs") or {}).items():
            named, field = _KINDS.get(kind, ("choices", "texts"))
            given["constraint"] = {"kind": named, field: value}
        sampling = Sampling.model_validate(
            {
                **given,
                "stop": tuple(body.get("stop") or ()),
                "logit_bias": {int(key): bias for key, bias in body.get("logit_bias", {}).items()},
            }
        )
        request = Request(
            id=new_id("cmpl"),
            model="m",
            input=TokensInput(ids=body["prompt"]),
            sampling=sampling,
            deadline_s=86_400.0,
        )
        return self._get_task(request, body)

    def _get_task(self, request: Request, body: Mapping[str, Any]) -> Task:
        return Task(
            id=request.id,
            attempt=1,
            request=request,
            digest=self._engine.info.digest,
            deadline_s=86_400.0,
            cache_salt=body.get("cache_salt", ""),
        )

    async def _stream(self, answer: _Answer) -> AsyncIterator[str]:
        try:
            async for event in answer:
                match event:
                    case Token():
                        choice = {
                            "index": event.choice,
                            "text": event.text,
                            "token_ids": [event.token_id],
                            "logprobs": _logprobs([event]),
                            "finish_reason": event.finish_reason,
                        }
                        yield _frame(self._reply([choice]))
                    case Finished():
                        yield _frame({**self._reply([]), "usage": _usage(event.usage)})
                    case Failed():
                        yield _frame({"error": {"message": event.failure.message, "code": 500}})
            yield "data: [DONE]\n\n"
        finally:
            answer.leave()

    async def _whole(self, answer: _Answer) -> Response:
        tokens: dict[int, list[Token]] = {}
        prompt: Sequence[ScoredToken] = ()
        async for event in answer:
            match event:
                case Token():
                    tokens.setdefault(event.choice, []).append(event)
                case PromptScored():
                    prompt = event.tokens
                case Failed():
                    return _error(500, event.failure.message)
                case Finished():
                    scored = [_prompt_logprob(token) for token in prompt] if prompt else None
                    choices = [
                        {
                            "index": index,
                            "text": "".join(token.text for token in said),
                            "token_ids": [token.token_id for token in said],
                            "logprobs": _logprobs(said),
                            "finish_reason": said[-1].finish_reason,
                            "prompt_logprobs": scored,
                        }
                        for index, said in sorted(tokens.items())
                    ]
                    return JSONResponse({**self._reply(choices), "usage": _usage(event.usage)})
        return _error(500, "The engine ended.")

    def _reply(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"object": "text_completion", "model": self._name, "choices": choices}

    def _refuse(self, http: HttpRequest) -> Response | None:
        given = http.headers.get("authorization", "")
        if hmac.compare_digest(given, f"Bearer {self._key}"):
            return None
        return JSONResponse({"error": "Unauthorized"}, status_code=401)


class _Answer:
    """The events of a task."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self._engine = engine
        self._task = task
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._ended = False

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        engine.submit(task, sink)

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        self._ended = isinstance(event, Finished | Failed)
        return event

    def leave(self) -> None:
        """Cancel the task, unless it has ended."""
        if not self._ended:
            self._engine.cancel(self._task.id, self._task.attempt)


def _logprobs(tokens: Sequence[Token]) -> dict[str, Any] | None:
    if not tokens or tokens[0].logprob is None:
        return None
    return {
        "tokens": [f"token_id:{token.token_id}" for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {f"token_id:{token.token_id}": token.logprob}
            | {f"token_id:{top.token_id}": top.logprob for top in token.top_logprobs}
            for token in tokens
        ],
    }


def _prompt_logprob(token: ScoredToken) -> dict[str, Any] | None:
    if token.logprob is None:
        return None
    entries = {str(top.token_id): {"logprob": top.logprob} for top in token.top_logprobs}
    return entries | {str(token.token_id): {"logprob": token.logprob}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


def _frame(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)


def main() -> None:
    """Load the model and serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-num-seqs", type=int, required=True)
    for sized in ("max-num-batched-tokens", "kv-cache-memory-bytes", "max-model-len"):
        parser.add_argument(f"--{sized}", type=int)
    parser.add_argument("--runner", choices=["generate", "pooling"], default="generate")
    parser.add_argument("--pooler-config", default="{}")
    parser.add_argument("--enable-prompt-tokens-details", action="store_true")
    for one in ("tensor-parallel-size", "pipeline-parallel-size", "nnodes"):
        parser.add_argument(f"--{one}", type=int, default=1)
    for one in ("node-rank", "master-port"):
        parser.add_argument(f"--{one}", type=int, default=0)
    parser.add_argument("--master-addr")
    parser.add_argument("--headless", action="store_true")
    given = parser.parse_args()
    num_ranks = given.tensor_parallel_size * given.pipeline_parallel_size
    local_ranks = num_ranks // given.nnodes
    rendezvous = f"{given.master_addr}:{given.master_port}"
    if given.headless:
        station = {
            "--rendezvous": rendezvous,
            "--num-ranks": num_ranks,
            "--first-rank": given.node_rank * local_ranks,
            "--local-ranks": local_ranks,
        }
        words = [str(word) for pair in station.items() for word in pair]
        agent = [sys.executable, "-m", "fabric.engine.partition.agent", *words]
        os.execv(sys.executable, agent)  # noqa: S606
    source = ModelSource.parse(given.model)
    engine = (EmbeddingEngine if source.embeds_sentences else TorchEngine)(
        source,
        EngineConfig(
            dtype=given.dtype,
            num_threads=1,
            cache_bytes=given.kv_cache_memory_bytes,
            max_rows=given.max_num_seqs,
            step_tokens=given.max_num_batched_tokens or 512,
            context_tokens=given.max_model_len,
            tensor_parallel=given.tensor_parallel_size,
            pipeline_parallel=given.pipeline_parallel_size,
            rendezvous=rendezvous if given.nnodes > 1 else None,
            local_ranks=local_ranks if given.nnodes > 1 else None,
        ),
        name=given.served_model_name,
    )
    engine.start()
    key = os.environ["VLLM_API_KEY"]
    pooler = json.loads(given.pooler_config)
    server = Server(
        engine,
        name=given.served_model_name,
        root=given.model,
        key=key,
        pools=given.runner == "pooling",
        kind=None if source.embeds_sentences else _POOLINGS[pooler.get("pooling_type", "LAST")],
    )
    try:
        uvicorn.run(server.app, host=given.host, port=given.port, log_level="warning")
    finally:
        engine.close()


if __name__ == "__main__":
    main()
