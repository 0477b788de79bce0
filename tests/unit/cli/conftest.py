from __future__ import annotations

from pathlib import Path

import pytest

from fabric.testing.admin import Admin


@pytest.fixture
def admin(tmp_path: Path) -> Admin:
    return Admin(f"sqlite:///{tmp_path / 'hub.db'}")
