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
    UserSum,
    Visibility,
)
from fabric.catalog.view import CatalogView, Viewer

__all__ = [
    "Catalog",
    "CatalogView",
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
    "UserSum",
    "Viewer",
    "Visibility",
]
