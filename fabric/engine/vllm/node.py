"""``python -m fabric.engine.vllm.node``: the part of a vLLM server on a further node of a block.

It becomes ``vllm serve --headless``. That outlives the first node's server; whoever
started it ends it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.vllm.command import get_node_command
from fabric.errors import FabricError
from fabric.messages import EngineOptions


def main(argv: Sequence[str]) -> int:
    """Become the node's vLLM; return only if that is not possible."""
    parser = argparse.ArgumentParser(prog="fabric.engine.vllm.node")
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--options", required=True, help="of the engine, as JSON")
    given = parser.parse_args(argv)
    options = EngineOptions.model_validate_json(given.options)
    try:
        command = get_node_command(
            options.vllm,
            EngineConfig.of(options),
            path=ModelSource.parse(given.source).resolve(),
            name=given.name,
            node_rank=given.node_rank,
        )
        os.execvp(command[0], command)  # noqa: S606 - a site's administrator wrote it
    except (FabricError, OSError) as error:
        print(f"vLLM cannot be started here: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
