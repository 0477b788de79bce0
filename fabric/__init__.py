"""Fabric: a federated function-as-a-service inference fabric for science.

``fabric.sdk.Fabric`` is the client; ``fabric`` and ``fabric-admin`` are the command lines.
The rooms of the package and what each may import are listed in docs/architecture.md.
"""

__version__ = "0.1.0"
