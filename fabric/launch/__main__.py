"""``python -m fabric.launch``: a site's agent; its ``AgentSpec`` is the first line of stdin."""

from __future__ import annotations

import asyncio
import logging
import sys

from fabric.errors import FabricError
from fabric.launch.agent import AgentSpec, SiteAgent


def main() -> int:
    """Run the agent; return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("fabric").setLevel(logging.INFO)
    spec = AgentSpec.model_validate_json(sys.stdin.readline())
    try:
        asyncio.run(SiteAgent(spec).run())
    except FabricError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
