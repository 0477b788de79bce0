"""Settings and site files; the only reader of the environment and of configuration files.

Precedence, later wins: defaults, the federation running on this machine, the site's file, the
user's file, environment variables, flags. ``fabric config show`` prints every value and its origin.
"""

from fabric.config.endpoint import ACCOUNT, EndpointSpec, MultiUser
from fabric.config.job import JobEnvironment, load_job
from fabric.config.settings import (
    ClientSettings,
    HubSettings,
    Origin,
    Settings,
    globus_scope_of,
    load_settings,
    user_config_path,
)
from fabric.config.site import (
    ComputeExecutor,
    LocalExecutor,
    Problem,
    SiteFile,
    SiteModel,
    SiteSpec,
    find_site,
    get_site_files,
    inspect_site,
    load_site,
    shipped_sites,
    user_sites_path,
)
from fabric.config.state import Federation, ProcessRecord, StateDir
from fabric.config.stores import (
    EndpointStore,
    FileStore,
    RedisStore,
    StoreConfig,
    load_store,
    save_store,
)
from fabric.config.system import (
    BalanceConfig,
    Bin,
    Charge,
    Network,
    NodeKind,
    Queue,
    Storage,
    System,
)
from fabric.config.worker import WorkerEnvironment, load_worker

__all__ = [
    "ACCOUNT",
    "BalanceConfig",
    "Bin",
    "Charge",
    "ClientSettings",
    "ComputeExecutor",
    "EndpointSpec",
    "EndpointStore",
    "Federation",
    "FileStore",
    "HubSettings",
    "JobEnvironment",
    "LocalExecutor",
    "MultiUser",
    "Network",
    "NodeKind",
    "Origin",
    "Problem",
    "ProcessRecord",
    "Queue",
    "RedisStore",
    "Settings",
    "SiteFile",
    "SiteModel",
    "SiteSpec",
    "StateDir",
    "Storage",
    "StoreConfig",
    "System",
    "WorkerEnvironment",
    "find_site",
    "get_site_files",
    "globus_scope_of",
    "inspect_site",
    "load_job",
    "load_settings",
    "load_site",
    "load_store",
    "load_worker",
    "save_store",
    "shipped_sites",
    "user_config_path",
    "user_sites_path",
]
