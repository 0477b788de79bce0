"""Settings, files and the state of this machine."""

from __future__ import annotations

from pathlib import PurePath

from fabric.errors.base import FabricError


class ConfigError(FabricError):
    """A setting, a file or the state of this machine does not allow the command."""

    code = "config_error"
    http_status = 500


class SettingInvalid(ConfigError):
    """A setting has a value that cannot be used."""

    code = "setting_invalid"

    def __init__(self, *, setting: str, value: object, reason: str, source: str = "") -> None:
        where = f" (from {source})" if source else ""
        shown = repr(str(value) if isinstance(value, PurePath) else value)
        super().__init__(
            f"The setting {setting!r} has the value {shown}{where}, which cannot be used:"
            f" {reason}.",
            setting=setting,
            value=str(value),
            reason=reason,
            source=source,
        )


class PortInUse(ConfigError):
    """Another process listens on the port the hub was given."""

    code = "port_in_use"

    def __init__(self, *, host: str, port: int) -> None:
        super().__init__(
            f"Port {port} on {host} is in use by another process; stop that process or choose"
            " another port with --port.",
            host=host,
            port=port,
        )


class AlreadyRunning(ConfigError):
    """A federation is already up in this state directory."""

    code = "already_running"

    def __init__(self, *, url: str, state_dir: str) -> None:
        super().__init__(
            f"A federation is already up at {url} (state in {state_dir}); use it, end it with"
            " `fabric down`, or choose another --state-dir.",
            url=url,
            state_dir=state_dir,
        )


class NotRunning(ConfigError):
    """No federation is up in this state directory."""

    code = "not_running"

    def __init__(self, *, state_dir: str) -> None:
        super().__init__(
            f"No federation is up (state directory {state_dir}); start one with `fabric up`.",
            state_dir=state_dir,
        )


class PackageMissing(ConfigError):
    """The command needs a package that this installation lacks."""

    code = "package_missing"

    def __init__(self, *, package: str, extra: str) -> None:
        super().__init__(
            f"The package {package!r} is not installed; install `fabric-inference[{extra}]`.",
            package=package,
            extra=extra,
        )


class EndpointInvalid(ConfigError):
    """A Globus Compute endpoint rendered from a site's file would not work."""

    code = "endpoint_invalid"

    def __init__(self, *, site: str, findings: dict[str, str]) -> None:
        listed = "; ".join(f"{check}: {reason}" for check, reason in findings.items())
        super().__init__(
            f"The endpoint of {site!r} would not work as its file describes it ({listed}); change"
            " the file and check again.",
            site=site,
            findings=findings,
        )


class SiteInvalid(ConfigError):
    """Site files do not follow the schema, or what comes from them would not work."""

    code = "site_invalid"

    def __init__(self, *, sites: list[str], num_checked: int) -> None:
        super().__init__(
            f"{len(sites)} of {num_checked} site files cannot be used ({', '.join(sites)}); change"
            " the fields that are listed and validate again.",
            sites=sites,
        )


class FilesForeign(ConfigError):
    """Files that would be replaced have been changed by somebody else."""

    code = "files_foreign"

    def __init__(self, *, directory: str, files: list[str]) -> None:
        super().__init__(
            f"{', '.join(files)} in {directory} was written or changed by somebody else; look at"
            " the difference with --dry-run, and replace it with --force (a copy is kept).",
            directory=directory,
            files=files,
        )
