"""The functions that sites register with Globus Compute: what ships, and what is registered.

They travel as source, which any release of Python 3.11 and later reads, and never as pickles.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING
from uuid import UUID

from fabric.errors import FunctionDrifted, NotFound, RequestInvalid, ServiceRefused

if TYPE_CHECKING:
    from globus_compute_sdk import Client

PACKAGE = "fabric.endpoints.functions"

_NUM_CHARS = re.compile(r"\A\d+\n")
_SOURCE = re.compile(r"\A(?:st|sd)\n\w+:")
"""How the SDK's strategies of pure source begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSource:
    """A function as text; ``description`` is the first line of its docstring."""

    name: str
    source: str
    description: str = ""

    @property
    def sha256(self) -> str:
        """The digest of the source, whatever blank lines are around it."""
        return hashlib.sha256(self.source.strip().encode()).hexdigest()


def shipped_functions() -> dict[str, FunctionSource]:
    """Return the functions of this release by name."""
    shipped = {}
    for file in sorted(resources.files(PACKAGE).iterdir(), key=lambda file: file.name):
        name = file.name.removesuffix(".py")
        if name != file.name and not name.startswith("_"):
            source = file.read_text(encoding="utf-8")
            (function,) = ast.parse(source).body
            assert isinstance(function, ast.FunctionDef)
            description = (ast.get_docstring(function) or "").partition("\n")[0]
            shipped[name] = FunctionSource(name=name, source=source, description=description)
    return shipped


def shipped_function(name: str) -> FunctionSource:
    """Return one function of this release.

    Raises:
        RequestInvalid: It ships none of this name.
    """
    shipped = shipped_functions()
    if name not in shipped:
        reason = f"the functions of this release are {', '.join(shipped)}"
        raise RequestInvalid(param="function", value=name, reason=reason)
    return shipped[name]


def register(
    client: Client,
    function: FunctionSource,
    *,
    group: UUID | None = None,
    public: bool = False,
    endpoint_id: UUID | None = None,
) -> UUID:
    """Register a function and return its id; each call makes another.

    Args:
        client: Whoever will own the function.
        function: What to register.
        group: The Globus group whose members may call it.
        public: Whether anybody may call it.
        endpoint_id: The only endpoint it may run at; such a function cannot be shared.

    Raises:
        RequestInvalid: More than one of ``group``, ``public`` and ``endpoint_id`` is given.
        ServiceRefused: The service does not take it.
        ServiceUnreachable: The service does not answer.
    """
    from fabric.compute.client import service_errors

    if (group is not None) + public + (endpoint_id is not None) > 1:
        reason = "a function is public, a group's, or one endpoint's"
        raise RequestInvalid(param="visibility", value="several", reason=reason)
    with service_errors():
        registered = client.register_source_code(
            function.source,
            function.name,
            description=function.description,
            public=public,
            group=group and str(group),
            ha_endpoint_id=endpoint_id and str(endpoint_id),
        )
    return UUID(registered)


def fetch_source(client: Client, function_id: UUID) -> FunctionSource:
    """Return a registered function. Its code is read as text and never loaded.

    Raises:
        NotFound: The service knows no function of this id.
        ServiceUnreachable: The service does not answer.
    """
    from fabric.compute.client import service_errors

    try:
        with service_errors():
            found = client.get_function(str(function_id))
    except ServiceRefused as error:
        if error.detail["status"] == 404:
            raise NotFound(kind="function", name=str(function_id)) from error
        raise
    return FunctionSource(
        name=str(found["function_name"]),
        source=unpack_source(str(found["function_code"])),
        description=str(found.get("description") or ""),
    )


def unpack_source(code: str) -> str:
    """Return the source in a function's code as the service keeps it.

    That is the source alone, or packed by the SDK: a line with the length of the rest, then a mark
    of the strategy, and the name before the source. Code of any other strategy is returned as it
    is, for its digest alone.
    """
    if code[:1].isdigit():
        code = _NUM_CHARS.sub("", code)
    return _SOURCE.sub("", code)


def check_source(shipped: FunctionSource, function_id: UUID | str, sha256: str) -> None:
    """Make sure that what is registered is what this release ships.

    Args:
        shipped: This release's function.
        function_id: Where it is registered.
        sha256: Of the source that is registered there, as it was fetched or is on record.

    Raises:
        FunctionDrifted: They differ.
    """
    if sha256 != shipped.sha256:
        raise FunctionDrifted(
            name=shipped.name, id=str(function_id), registered=sha256, shipped=shipped.sha256
        )


def retire(client: Client, function_id: UUID) -> None:
    """Delete a function at the service; one that is not there any more is no error.

    Raises:
        ServiceRefused: It is somebody else's.
        ServiceUnreachable: The service does not answer.
    """
    from fabric.compute.client import service_errors

    try:
        with service_errors():
            client.delete_function(str(function_id))
    except ServiceRefused as error:
        if error.detail["status"] != 404:
            raise
