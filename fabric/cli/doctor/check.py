"""What a check is, and what it finds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from fabric.errors import FabricError

ASK_S = 10.0
"""How long whatever a check asks over the network may take to answer."""

Level = Literal["ok", "warning", "wrong", "skipped"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found, and what to do about it where something is not as it should be."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


class Check(Protocol):
    """One question about a site, its hub or this machine. It looks, and changes nothing."""

    @property
    def name(self) -> str:
        """What its findings are called."""

    def run(self) -> Iterator[Finding]:
        """Yield at least one finding; those that are ``warning`` or ``wrong`` have a remedy.

        Raises:
            FabricError: What it looked at is not usable; that counts as ``wrong``.
        """


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Run checks one after the other; what one of them meets does not keep the others from it."""
    for check in checks:
        try:
            yield from check.run()
        except FabricError as error:
            what, _, remedy = error.message.partition("; ")
            yield Finding(
                check=check.name,
                level="wrong",
                detail=what,
                remedy=remedy or "do what the message says, and run this again",
            )
        except Exception as error:
            logger.debug("A check failed.", exc_info=True)
            yield Finding(
                check=check.name,
                level="wrong",
                detail=f"the check itself failed ({type(error).__name__}: {error})",
                remedy="this is a defect: report what `fabric-admin doctor -vv` says",
            )
