"""The hub as this machine sees it: does it answer, is it of this release, do the clocks agree?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from fabric import __version__
from fabric.cli.doctor.check import ASK_S, Finding
from fabric.messages.session import PROTOCOL

WRONG_SKEW_S = 30.0
"""Tokens are taken up to 60 s early or late; half of that is spent here, half at the other end."""
WARNING_SKEW_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheck:
    """Does the hub answer, and do this release and it understand each other?"""

    url: str
    name: str = "hub"

    def run(self) -> Iterator[Finding]:
        """Ask for its health."""
        try:
            answer = httpx.get(f"{self.url}/healthz", timeout=ASK_S)
            told = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{self.url} does not answer as a hub: {error or type(error).__name__}",
                remedy="start it (`fabric-admin hub`), or give its address with --hub;"
                " see that no firewall or proxy is between",
            )
            return
        if not answer.is_success or not isinstance(told, dict) or told.get("status") != "ok":
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"{self.url} answers {answer.status_code}: {answer.text[:120]}",
                remedy="look into the hub's log; `fabric-admin db verify` asks its database",
            )
            return
        yield self._compare(told)

    def _compare(self, told: dict[str, object]) -> Finding:
        release, protocol = told.get("release", "unknown"), told.get("protocol")
        if protocol != PROTOCOL:
            return Finding(
                check=self.name,
                level="wrong",
                detail=f"{self.url} speaks protocol {protocol} (release {release}), and instances"
                f" from here would speak {PROTOCOL} (release {__version__})",
                remedy=f"install the hub's release here: pip install fabric-inference=={release}",
            )
        if release != __version__:
            return Finding(
                check=self.name,
                level="warning",
                detail=f"{self.url} is of release {release}, and here is {__version__};"
                " they understand each other",
                remedy="install one release at both, when there is time",
            )
        detail = f"{self.url} answers; release {release}, protocol {protocol}"
        return Finding(check=self.name, level="ok", detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockCheck:
    """Do this machine's clock and a server's agree? Leases and tokens need it.

    Args:
        url: Of any server that sends ``Date``.
    """

    url: str
    name: str = "clock"

    def run(self) -> Iterator[Finding]:
        """Compare the answer's date with the middle of the time that it took."""
        began_s = time.time()
        try:
            answer = httpx.get(self.url, timeout=ASK_S)
            told_s = parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (httpx.HTTPError, httpx.InvalidURL, KeyError, ValueError) as error:
            yield Finding(
                check=self.name,
                level="skipped",
                detail=f"{self.url} tells no time ({type(error).__name__})",
            )
            return
        # A date is cut to whole seconds: on average it is half of one behind.
        ahead_s = (began_s + time.time()) / 2 - (told_s + 0.5)
        told = (
            f"this clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'}"
            f" that of {self.url}"
        )
        if abs(ahead_s) < WARNING_SKEW_S:
            yield Finding(check=self.name, level="ok", detail=told)
            return
        yield Finding(
            check=self.name,
            level="wrong" if abs(ahead_s) > WRONG_SKEW_S else "warning",
            detail=told,
            remedy="have both kept by NTP (`timedatectl set-ntp true`, or chrony), and see with"
            " `timedatectl` which of them is wrong",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCheck:
    """Does the hub take a site's key as that site's?"""

    url: str
    token: str
    site: str
    name: str = "key"

    def run(self) -> Iterator[Finding]:
        """Ask the hub who has the key."""
        headers = {"Authorization": f"Bearer {self.token}"}
        remedy = (
            f"make another: fabric-admin key add PROJECT --scope site --site {self.site} > FILE"
        )
        try:
            answer = httpx.get(f"{self.url}/v1/fabric/whoami", headers=headers, timeout=ASK_S)
            told = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            detail = f"the hub could not be asked ({type(error).__name__})"
            yield Finding(check=self.name, level="skipped", detail=detail)
            return
        if not answer.is_success:
            reason = told.get("error", {}).get("message", answer.text[:120])
            yield Finding(check=self.name, level="wrong", detail=reason, remedy=remedy)
        elif "site" not in told["scopes"] or told.get("site", self.site) != self.site:
            yield Finding(
                check=self.name,
                level="wrong",
                detail=f"the key may {', '.join(told['scopes'])}, but is not of the site's agent",
                remedy=remedy,
            )
        else:
            detail = f"the hub takes it as the agent's of {self.site}"
            yield Finding(check=self.name, level="ok", detail=detail)
