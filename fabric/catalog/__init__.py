"""The SQL records of sites, model versions, launches and runs."""

from fabric.catalog.catalog import Catalog
from fabric.catalog.records import (
    LaunchRecord,
    ModelVersion,
    RunRecord,
    SiteRecord,
    SiteState,
    UsageSum,
)

__all__ = [
    "Catalog",
    "LaunchRecord",
    "ModelVersion",
    "RunRecord",
    "SiteRecord",
    "SiteState",
    "UsageSum",
]
