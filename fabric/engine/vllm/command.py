"""The command line of a vLLM server: the same on every node of an instance but for a few words.

Source: vLLM 0.32, ``vllm serve --help=all`` (``--nnodes``, ``--headless``, ``--runner``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fabric.engine.config import EngineConfig
from fabric.engine.source import is_sentence_model
from fabric.errors import SettingInvalid
from fabric.messages import VllmOptions

Runner = Literal["generate", "pooling"]
"""What a server does with prompts: it goes on after them, or makes vectors of them."""

_MEAN = '{"pooling_type": "MEAN"}'
"""What becomes of a model that was not made to embed, as in our engine."""


def get_runner(options: VllmOptions, path: Path) -> Runner:
    """Return what the server of the model in this directory does."""
    return options.runner or ("pooling" if is_sentence_model(path) else "generate")


def get_command(
    options: VllmOptions, config: EngineConfig, *, path: Path, name: str, port: int | None
) -> list[str]:
    """Return what is run on the node that answers.

    Args:
        options: The command, and what is given to it after ours.
        config: The limits it is started with, and how the model is divided.
        path: The directory of the model's files.
        name: What the instance calls the model.
        port: On loopback; ``None``: it answers nobody, and follows another node.

    Raises:
        SettingInvalid: The ranks cannot be divided evenly among the nodes.
    """
    pools = get_runner(options, path) == "pooling"
    # What is pooled runs whole: vLLM's own choice has room for its longest prompt.
    step_tokens = None if pools else max(config.step_tokens, config.max_rows)
    given = {
        "model": path,
        "served-model-name": name,
        "host": None if port is None else "127.0.0.1",
        "port": port,
        "dtype": config.dtype,
        "max-num-seqs": config.max_rows,
        "max-num-batched-tokens": step_tokens,
        "kv-cache-memory-bytes": config.cache_bytes,
        "max-model-len": config.context_tokens,
        "runner": "pooling" if pools else None,
        "pooler-config": _MEAN if pools and not is_sentence_model(path) else None,
        **_get_division(config),
    }
    words = [f"--{option}={value}" for option, value in given.items() if value is not None]
    return [*options.command, *words, "--enable-prompt-tokens-details", *options.args]


def get_node_command(
    options: VllmOptions, config: EngineConfig, *, path: Path, name: str, node_rank: int
) -> list[str]:
    """Return what is run on a further node. Arguments and Raises as ``get_command``'s."""
    command = get_command(options, config, path=path, name=name, port=None)
    return [word for word in command if word != "--node-rank=0"] + [
        f"--node-rank={node_rank}",
        "--headless",
    ]


def _get_division(config: EngineConfig) -> dict[str, object]:
    if config.num_ranks == 1:
        return {}
    division: dict[str, object] = {
        "tensor-parallel-size": config.tensor_parallel,
        "pipeline-parallel-size": config.pipeline_parallel,
    }
    if config.rendezvous is None or config.local_ranks is None:
        return division
    num_nodes, more = divmod(config.num_ranks, config.local_ranks)
    if more:
        reason = f"vLLM puts as many of the {config.num_ranks} ranks on every node"
        raise SettingInvalid(setting="local_ranks", value=config.local_ranks, reason=reason)
    host, _, port = config.rendezvous.rpartition(":")
    several = {"nnodes": num_nodes, "node-rank": 0, "master-addr": host, "master-port": port}
    return division | several
