"""Asking a command of the centre: never through a shell, never for long."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from fabric.errors import BalanceUnavailable, RequestInvalid
from fabric.launch.balances.protocol import Balance

TIMEOUT_S = 60.0
"""Accounting databases of large machines take their time."""

_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandBalance:
    """What a centre's own command says of a project to the user who asks.

    Args:
        command: The command; ``{project}`` in it is the project's name.
        parse: Finds the project's balance in what it writes.
        timeout_s: How long it may take.
    """

    command: str
    parse: Callable[[str, str], Balance]
    timeout_s: float = TIMEOUT_S

    async def balance(self, project: str) -> Balance:
        """Return what the command says of a project."""
        command = self.command.format(project=check_project(project))
        return self.parse(await ask(*command.split(), timeout_s=self.timeout_s), project)


async def ask(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """Return what a command writes to standard output.

    Raises:
        BalanceUnavailable: It is not there, takes too long, or fails.
    """
    shown = " ".join(command)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise BalanceUnavailable(
            command=shown,
            reason=f"it cannot be run ({error.strerror})",
            remedy="ask on a login node of the centre, where it is installed",
        ) from error
    try:
        async with asyncio.timeout(timeout_s):
            output, complaint = await process.communicate()
    except TimeoutError as error:
        raise BalanceUnavailable(
            command=shown, reason=f"it did not answer in {timeout_s:g} s", remedy="ask again later"
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = (complaint or output).decode(errors="replace").strip()[:300].rstrip(".")
        raise BalanceUnavailable(
            command=shown,
            reason=f"it ended with {process.returncode} and said: {said or 'nothing'}",
            remedy="see that you may charge this project, and run the command yourself",
        )
    return output.decode(errors="replace")


def check_project(project: str) -> str:
    """Return a project's name that is safe on a command line and in an address.

    Raises:
        RequestInvalid: It is not.
    """
    if not _PROJECT.fullmatch(project):
        reason = "a project's name has letters, digits and . _ - only, at most 64 of them"
        raise RequestInvalid(param="project", value=project, reason=reason)
    return project


def to_amount(text: str) -> Decimal:
    """Return an amount such as ``25,483,927.5``."""
    return Decimal(text.replace(",", ""))


def no_allocation(command: str, project: str) -> BalanceUnavailable:
    """Return the error for an answer that has nothing about the project in it."""
    return BalanceUnavailable(
        command=command,
        reason=f"it tells of no allocation of {project!r}",
        remedy="see that the name is right, and that you are a member of the project",
    )
