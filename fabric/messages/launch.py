"""What a launch is given: the site agent asks the hub for it and hands it to the block."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from fabric.messages.request import ModelRef, SiteName
from fabric.messages.wire import Wire

MAX_RANKS = 1024


class VllmOptions(Wire):
    """The vLLM server that computes where ``EngineOptions.backend`` is ``vllm``.

    ``command`` starts one, which ends with the instance, and ``args`` are given to it after ours;
    it has ``start_s`` seconds to become healthy. With ``url`` one that runs already is used: it
    serves the same files, and the key it asks for is in ``key_path``. ``runner`` is vLLM's word: a
    server generates or, as ``pooling``, embeds; ``None`` lets sentence-embedding models embed and
    others generate.
    """

    command: tuple[str, ...] = Field(default=("vllm", "serve"), min_length=1)
    args: tuple[str, ...] = ()
    url: str | None = Field(default=None, pattern=r"^https?://")
    key_path: str | None = None
    start_s: float = Field(default=900.0, gt=0.0)
    runner: Literal["generate", "pooling"] | None = None


class EngineOptions(Wire):
    """What computes at a site and how it is sized; ``None`` lets the engine choose.

    ``tensor_parallel`` x ``pipeline_parallel`` processes hold the model together; ``num_threads``
    and ``cache_bytes`` are of each. See ``fabric.engine.config``.
    """

    backend: Literal["fabric", "vllm"] = "fabric"
    vllm: VllmOptions = VllmOptions()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "flex", "gathered"] = "auto"
    graphs: bool = True
    dtype: str | None = None
    num_threads: int | None = Field(default=None, ge=1)
    cache_bytes: int | None = Field(default=None, ge=1)
    max_rows: int = Field(default=16, ge=1)
    step_tokens: int = Field(default=512, ge=1)
    weights: str | None = None
    batch_invariant: bool = False
    speculation: str | None = None
    draft_model: str | None = None
    tensor_parallel: int = Field(default=1, ge=1, le=MAX_RANKS)
    pipeline_parallel: int = Field(default=1, ge=1, le=MAX_RANKS)
    stage_layers: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    partitioner: Literal["torch", "deepspeed"] = "torch"
    rendezvous: str | None = Field(default=None, pattern=r"^[^:\s]+:\d{1,5}$")
    rendezvous_fd: int | None = Field(default=None, ge=3)
    local_ranks: int | None = Field(default=None, ge=1)
    rank_timeout_s: float | None = Field(default=None, gt=0)
    offload: Literal["none", "host", "disk"] = "none"
    adapter_bytes: int | None = Field(default=None, ge=0)


class Launch(Wire):
    """The hub's answer to a site agent: one instance may be started and join with ``token``.

    ``source`` says where the weights are (``fabric.engine.model.ModelSource``); ``digest`` is what
    they must hash to, if the version has been registered; ``session_path`` is relative to the
    address the agent itself reached the hub by.
    """

    instance: str
    site: SiteName
    model: ModelRef
    source: str
    digest: str | None
    token: str
    session_path: str = "/v1/fabric/session"


class InstanceSpec(Wire):
    """Everything an instance process needs, given on its standard input and never in arguments.

    ``session_url`` is the hub's WebSocket address, or ``None`` for an instance that is reached by
    its direct route alone. Whoever shows ``direct_token`` on the direct route is the hub;
    ``guest_token`` admits users of the site, each of whose tasks carries a ticket. The process
    writes its ``InstanceStatus`` to ``status_path``. ``grace_s`` after SIGTERM it gives back what
    still runs. It ends if it is ready and has not reached the hub within ``join_s``; without, it
    tries for ever.
    """

    launch: Launch
    session_url: str | None
    direct_token: str
    guest_token: str | None = None
    options: EngineOptions = EngineOptions()
    status_path: str
    deadline_s: float | None = None
    heartbeat_s: float = 2.0
    grace_s: float = Field(default=6.0, ge=0.0)
    join_s: float | None = Field(default=None, gt=0.0)


class Reach(Wire):
    """How the hub reaches an instance that does not dial it: through an endpoint's workers.

    ``config`` is the user endpoint's, ``functions`` the registered functions by name if the site
    has its own, ``run_dir`` where they find the instance on site, ``direct_token`` what opens its
    direct route there.
    """

    endpoint_id: UUID
    config: dict[str, Any] = {}
    functions: dict[str, UUID] = {}
    run_dir: str = Field(max_length=1024)
    direct_token: str = Field(max_length=256)


class InstanceStatus(Wire):
    """What an instance last wrote about itself, for whoever started it.

    ``guest_token`` opens the direct route to raw calls; the file is its owner's alone.
    """

    instance: str
    model: str = ""
    state: str
    pid: int
    detail: str = ""
    direct_url: str | None = None
    guest_token: str | None = Field(default=None, repr=False)
