"""The SQL records of sites, model versions, launches and runs."""

from fabric.catalog.catalog import Catalog
from fabric.catalog.records import (
    FunctionRecord,
    LaunchRecord,
    ModelVersion,
    OwnSite,
    RedemptionRecord,
    RunRecord,
    SiteRecord,
    SiteState,
    UsageSum,
    UserSum,
    Visibility,
)

__all__ = [
    "Catalog",
    "FunctionRecord",
    "LaunchRecord",
    "ModelVersion",
    "OwnSite",
    "RedemptionRecord",
    "RunRecord",
    "SiteRecord",
    "SiteState",
    "UsageSum",
    "UserSum",
    "Visibility",
]
