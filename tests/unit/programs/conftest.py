"""Tiny models of four families, made once."""

from __future__ import annotations

import pytest
import torch

from fabric.messages.points import PointManifest
from fabric.testing.tiny_models import FAMILIES, Tiny, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tinies() -> dict[str, Tiny]:
    return {family: tiny_model(family) for family in FAMILIES}


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tinies: dict[str, Tiny]) -> Tiny:
    return tinies[request.param]


@pytest.fixture(scope="session")
def llama(tinies: dict[str, Tiny]) -> Tiny:
    return tinies["llama"]


@pytest.fixture(scope="session")
def manifest(llama: Tiny) -> PointManifest:
    return llama.manifest
