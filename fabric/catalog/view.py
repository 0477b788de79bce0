"""The catalog as one caller sees it: what is hidden from the caller is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fabric.catalog.records import ModelVersion, SiteRecord
from fabric.errors import UnknownModel, UnknownSite

if TYPE_CHECKING:
    from fabric.catalog.catalog import Catalog


class Viewer(Protocol):
    """Whose eyes the catalog is seen with."""

    @property
    def project(self) -> str:
        """For whom the caller acts."""

    @property
    def key_id(self) -> str:
        """Who that is."""

    def sees_model(self, model: str) -> bool:
        """Return whether a model of this name is there for the caller, if there is one at all."""

    def sees_site(self, site: str) -> bool:
        """Return whether a site of this name is there for the caller, if there is one at all."""


class CatalogView:
    """What a viewer may know of. Its refusals are those of names that nobody has ever used.

    Args:
        catalog: All there is.
        viewer: Who looks.
    """

    def __init__(self, catalog: Catalog, viewer: Viewer) -> None:
        self._catalog = catalog
        self._viewer = viewer

    def models(self) -> list[ModelVersion]:
        """Return all versions: by name, the newest of each first."""
        return [one for one in self._catalog.models() if self._viewer.sees_model(one.name)]

    def resolve(self, ref: str) -> ModelVersion:
        """Return the version that a reference names; see ``Catalog.resolve``.

        Raises:
            UnknownModel: There is none for the viewer.
        """
        if self._viewer.sees_model(ref.partition("@")[0]):
            try:
                return self._catalog.resolve(ref)
            except UnknownModel:
                pass
        raise UnknownModel(model=ref, known=[one.ref for one in self.models()])

    def sites(self) -> list[SiteRecord]:
        """Return the sites where the viewer's requests may run, in order of name."""
        return [one for one in self._catalog.sites() if self.shows(one)]

    def get_site(self, name: str) -> SiteRecord:
        """Return a site.

        Raises:
            UnknownSite: There is none for the viewer.
        """
        found = {one.name: one for one in self.sites()}
        if name not in found:
            raise UnknownSite(site=name, known=list(found))
        return found[name]

    def shows(self, site: SiteRecord) -> bool:
        """Return whether the viewer may know of a site."""
        viewer = self._viewer
        return site.may_use(viewer.project, viewer.key_id) and viewer.sees_site(site.name)
