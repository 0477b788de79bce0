"""The gateway: the hub's HTTP and WebSocket face.

OpenAI's routes, the fabric's own, and the sessions of instances, behind one check of callers.
"""

from fabric.gateway.app import create_app
from fabric.gateway.assembly import open_app
from fabric.gateway.batch_lines import LineAnswerer
from fabric.gateway.hub import GatewaySettings
from fabric.gateway.metrics import Metrics
from fabric.gateway.outreach import Outreach
from fabric.gateway.server import get_server_config

__all__ = [
    "GatewaySettings",
    "LineAnswerer",
    "Metrics",
    "Outreach",
    "create_app",
    "get_server_config",
    "open_app",
]
