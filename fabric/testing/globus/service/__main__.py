"""Serve the stand-in until told to end."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from fabric.testing.globus.service.app import create_app
from fabric.testing.globus.service.settings import ServiceSettings
from fabric.testing.ports import listener

settings = ServiceSettings.model_validate_json(Path(sys.argv[1]).read_bytes())
# httptools understands requests that name the whole URL, as those to a proxy do.
config = uvicorn.Config(
    create_app(settings),
    http="httptools",
    ws="none",
    log_level="warning",
    access_log=False,
    timeout_graceful_shutdown=2,
)
uvicorn.Server(config).run(sockets=[listener(settings.port)])
