"""The SQL records of sites, model versions, launches and runs."""

from fabric.catalog.catalog import Catalog
from fabric.catalog.records import (
    FunctionRecord,
    LaunchRecord,
    Maintenance,
    ModelVersion,
    OwnSite,
    RedemptionRecord,
    RunRecord,
    SiteRecord,
    SiteRules,
    SiteState,
    UsageSum,
    Visibility,
)

__all__ = [
    "Catalog",
    "FunctionRecord",
    "LaunchRecord",
    "Maintenance",
    "ModelVersion",
    "OwnSite",
    "RedemptionRecord",
    "RunRecord",
    "SiteRecord",
    "SiteRules",
    "SiteState",
    "UsageSum",
    "Visibility",
]
