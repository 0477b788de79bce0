"""The two command lines. Nothing but click is imported before a command is called."""

from __future__ import annotations

import click

from fabric import __version__
from fabric.cli.exits import EPILOG
from fabric.cli.lazy import LazyGroup

_COMMANDS = "fabric.cli.commands"
_ADMIN = "fabric.cli.admin"

_USER_TABLE = {
    "up": (f"{_COMMANDS}.up", "Start a hub and local sites on this machine."),
    "down": (f"{_COMMANDS}.down", "End what `fabric up` started."),
    "demo": (f"{_COMMANDS}.demo", "Watch a federation answer, lose a site, and answer again."),
    "login": (f"{_COMMANDS}.login", "Log in to the hub with Globus."),
    "logout": (f"{_COMMANDS}.logout", "Forget and revoke the Globus login."),
    "whoami": (f"{_COMMANDS}.whoami", "Show who you are to the hub."),
    "status": (f"{_COMMANDS}.status", "Show the hub, who you are to it, and its sites."),
    "query": (f"{_COMMANDS}.query", "Ask one question."),
    "chat": (f"{_COMMANDS}.chat", "Talk with a model."),
    "embed": (f"{_COMMANDS}.embed", "Turn texts into vectors."),
    "lens": (f"{_COMMANDS}.lens", "Show what each layer of a model would say."),
    "points": (f"{_COMMANDS}.points", "List where programs may read and write in a model."),
    "trace": (f"{_COMMANDS}.trace", "Run intervention programs."),
    "models": (f"{_COMMANDS}.models", "List the models."),
    "sites": (f"{_COMMANDS}.sites", "List the sites and their replicas."),
    "explain": (f"{_COMMANDS}.explain", "Show where a request would run, and why."),
    "top": (f"{_COMMANDS}.top", "Watch sites, replicas, queues and spend."),
    "estimate": (f"{_COMMANDS}.estimate", "Show what many requests would take and cost."),
    "plan": (f"{_COMMANDS}.plan", "Show what a model needs of devices, and how fast it could be."),
    "launch": (f"{_COMMANDS}.launch", "Bring an allocation: start a model in jobs of your own."),
    "instances": (f"{_COMMANDS}.instances", "List your launches and their jobs."),
    "logs": (f"{_COMMANDS}.logs", "Show what an instance of yours has written."),
    "extend": (f"{_COMMANDS}.extend", "Keep a launch going for longer."),
    "stop": (f"{_COMMANDS}.stop", "End a launch: drain its instances and its jobs."),
    "runs": (f"{_COMMANDS}.runs", "List your runs, or show one."),
    "usage": (f"{_COMMANDS}.usage", "Show allocations and charges."),
    "adapter": (f"{_COMMANDS}.adapter", "Keep LoRA adapters of your own."),
    "batch": (f"{_COMMANDS}.batch", "Have many requests answered from one file."),
    "ticket": (f"{_COMMANDS}.ticket", "Get a ticket for raw Globus Compute calls at a site."),
    "config": (f"{_COMMANDS}.config", "Show settings and where they come from."),
    "completion": ("fabric.cli.completion", "Make a shell complete commands."),
}

_ADMIN_TABLE = {
    "hub": ("fabric.cli.hub", "Serve a hub in the foreground."),
    "site": (f"{_ADMIN}.site", "Places where models run."),
    "endpoint": (f"{_ADMIN}.endpoint", "The Globus Compute endpoint of a site."),
    "model": (f"{_ADMIN}.model", "Versions of models that may be asked."),
    "replica": (f"{_ADMIN}.replica", "Instances that serve, or may join."),
    "function": (f"{_ADMIN}.function", "Functions registered with Globus Compute."),
    "project": (f"{_ADMIN}.project", "Who is charged."),
    "user": (f"{_ADMIN}.user", "Who asks, and how much."),
    "key": (f"{_ADMIN}.key", "API keys of a project."),
    "grant": (f"{_ADMIN}.grant", "Who may use private models and sites."),
    "limit": (f"{_ADMIN}.limit", "Requests and tokens a minute, and how many at once."),
    "audit": (f"{_ADMIN}.audit", "What administrators changed."),
    "alloc": (f"{_ADMIN}.alloc", "What a project may spend at a site."),
    "rate": (f"{_ADMIN}.rate", "What tokens cost."),
    "maintenance": (f"{_ADMIN}.maintenance", "Times in which a site takes no requests."),
    "reconcile": (f"{_ADMIN}.reconcile", "Compare a centre's charges with what was billed."),
    "tier": (f"{_ADMIN}.tier", "What haste costs."),
    "db": (f"{_ADMIN}.db", "The hub's database."),
    "doctor": (f"{_ADMIN}.doctor", "Look for what is wrong, and say what to do."),
    "completion": ("fabric.cli.completion", "Make a shell complete commands."),
}

_SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(cls=LazyGroup, table=_USER_TABLE, epilog=EPILOG, context_settings=_SETTINGS)
@click.version_option(__version__, message="fabric %(version)s")
def fabric() -> None:
    """Ask large models at research computing centres."""


@click.group(cls=LazyGroup, table=_ADMIN_TABLE, epilog=EPILOG, context_settings=_SETTINGS)
@click.version_option(__version__, message="fabric-admin %(version)s")
def fabric_admin() -> None:
    """Administer a hub: works on its database (--database, or the setting hub.database_url)."""
