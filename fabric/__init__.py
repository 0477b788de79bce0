"""Fabric: a federated function-as-a-service inference fabric for science.

``fabric.sdk.Fabric`` is the client, ``fabric.trace`` and ``fabric.session`` look inside a model,
``fabric.recipes`` are the published ways of doing so; ``fabric`` and ``fabric-admin`` are the
command lines. The rooms of the package and what each may import are listed in docs/architecture.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric.sdk import recipes
    from fabric.sdk.tracing import session, trace

__version__ = "0.1.0"
__all__ = ["__version__", "recipes", "session", "trace"]


def __getattr__(name: str) -> Any:
    # numpy and pydantic are for those who trace: every command imports this file.
    from importlib import import_module

    if name in ("session", "trace"):
        return getattr(import_module("fabric.sdk.tracing"), name)
    if name == "recipes":
        return import_module("fabric.sdk.recipes")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
