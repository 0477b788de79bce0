"""The files of a Globus Compute endpoint, from what its administrator wrote in the site's file.

The user configuration template is rendered twice: here with the administrator's facts, whose
delimiters are square brackets, and by the endpoint with a caller's options, in braces. What is
filled in here is written as a quoted YAML scalar without a brace, so no text of a site's file can
become part of the structure, or of the second rendering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fabric.config import ACCOUNT, ComputeExecutor, EndpointSpec, SiteSpec
from fabric.errors import PackageMissing, SettingInvalid

if TYPE_CHECKING:
    from jinja2 import Environment

TRIO = ("config.yaml", "user_config_template.yaml.j2", "user_config_schema.json")
PLACES = ("block", "login")
"""Where a caller's functions run: in a block, or beside the endpoint when they need none."""


def get_endpoint_files(
    site: SiteSpec, directory: Path, functions: tuple[UUID, ...] = ()
) -> dict[str, str]:
    """Render the endpoint's files.

    Args:
        site: The site; its ``endpoint`` says how blocks are started.
        directory: Where the files will lie.
        functions: Allowed besides those of the site's file.

    Returns:
        Name to text: the trio, and for a multi-user endpoint its identity mapping and, when it has
        a Globus Auth project, the authentication policy to make there.

    Raises:
        SettingInvalid: The site's file has no endpoint.
        PackageMissing: What renders templates is not installed.
    """
    spec = get_endpoint(site)
    names = list(TRIO)
    if spec.multi_user:
        names.append("identity_mapping.json")
        if spec.multi_user.auth_project:
            names.append("authentication_policy.json")
    facts = {
        "endpoint": spec,
        "site": site.name,
        "display_name": spec.display_name or site.title or site.name,
        "directory": str(directory),
        "functions": sorted(map(str, {*allowed_functions(site), *functions})),
        "chosen": _get_chosen(spec),
        "properties": _get_properties(spec),
    }
    environment = _get_environment()
    files = {}
    for name in names:
        template = environment.select_template([f"{spec.scheduler}/{name}", f"base/{name}"])
        files[name] = template.render(facts)
    return files


def get_endpoint(site: SiteSpec) -> EndpointSpec:
    """Return how the site's endpoint starts blocks.

    Raises:
        SettingInvalid: The site's file does not say.
    """
    if site.endpoint is None:
        raise SettingInvalid(
            setting="endpoint",
            value=None,
            reason="the site has no endpoint section; say at least its scheduler, as in"
            " `endpoint: {scheduler: local}`",
            source=f"the file of {site.name}",
        )
    return site.endpoint


def allowed_functions(site: SiteSpec) -> set[UUID]:
    """Return the functions that may run at a site: its executor's, and those its endpoint names."""
    executor = site.executor
    known = executor.functions.values() if isinstance(executor, ComputeExecutor) else ()
    return {*known, *get_endpoint(site).allowed_functions}


class _Text(str):
    """A piece of the file as it stands."""

    __slots__ = ()


def _get_environment() -> Environment:
    try:
        from jinja2 import FileSystemLoader, StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        raise PackageMissing(package="jinja2", extra="site") from error
    with resources.as_file(resources.files("fabric.endpoints")) as folder:
        return ImmutableSandboxedEnvironment(
            loader=FileSystemLoader(folder / "templates"),
            undefined=StrictUndefined,
            finalize=_to_yaml,
            block_start_string="[%",
            block_end_string="%]",
            variable_start_string="[[",
            variable_end_string="]]",
            comment_start_string="[#",
            comment_end_string="#]",
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )


def _to_yaml(value: Any) -> str:
    """Return a value in the common part of YAML and JSON; text has no brace in it."""
    match value:
        case _Text():
            return value
        case str():
            return '"' + "".join(map(_escaped, value)) + '"'
        case UUID():
            return f'"{value}"'
        case list() | tuple():
            return "[" + ", ".join(map(_to_yaml, value)) + "]"
        case dict():
            return json.dumps(value, indent=2).replace("\n", "\n  ")
        case _:
            return json.dumps(value)


def _escaped(character: str) -> str:
    if " " <= character <= "~" and character not in '"\\{}':
        return character
    if character in _SHORT:
        return _SHORT[character]
    return f"\\u{ord(character):04x}" if character <= "\uffff" else f"\\U{ord(character):08x}"


_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def _get_chosen(spec: EndpointSpec) -> Mapping[str, _Text]:
    """Return, for each field users may be given a say in, what the first rendering leaves of it."""
    options = spec.options()
    chosen = {}
    for name in type(spec.choices).model_fields:
        own = _to_yaml(getattr(spec, name))
        if name in options:
            # Globus Compute has quoted the option; it is never quoted again.
            own = f"{{% if {name} is defined %}}{{{{ {name} }}}}{{% else %}}{own}{{% endif %}}"
        chosen[name] = _Text(own)
    return chosen


def _get_properties(spec: EndpointSpec) -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = {"place": {"enum": list(PLACES), "default": PLACES[0]}}
    for name, values in spec.options().items():
        if values == "any":
            properties[name] = {"type": "string", "pattern": ACCOUNT, "examples": ["my-account"]}
        else:
            properties[name] = {"enum": list(values)}
        if (own := getattr(spec, name)) is not None:
            properties[name]["default"] = own
    return properties
