"""Settings and site files; the only reader of the environment and of configuration files.

Precedence, later wins: defaults, the federation running on this machine, the site's file, the
user's file, environment variables, flags. ``fabric config show`` prints every value and its origin.
"""

from fabric.config.settings import (
    ClientSettings,
    HubSettings,
    Origin,
    Settings,
    load_settings,
    user_config_path,
)
from fabric.config.site import SiteModel, SiteSpec, load_site, shipped_sites
from fabric.config.state import Federation, ProcessRecord, StateDir

__all__ = [
    "ClientSettings",
    "Federation",
    "HubSettings",
    "Origin",
    "ProcessRecord",
    "Settings",
    "SiteModel",
    "SiteSpec",
    "StateDir",
    "load_settings",
    "load_site",
    "shipped_sites",
    "user_config_path",
]
