"""From a site's file to its source of balances."""

from __future__ import annotations

from functools import partial

from fabric.config import SiteSpec
from fabric.errors import SettingInvalid
from fabric.launch.balances import accounts, mybalance, sbank, showusage, taccinfo
from fabric.launch.balances.command import CommandBalance
from fabric.launch.balances.iri import FacilityBalance
from fabric.launch.balances.protocol import BalanceSource
from fabric.launch.balances.slurm import SlurmBalance

_BY_COMMAND = {
    "accounts": CommandBalance(command=accounts.COMMAND, parse=accounts.parse),
    "mybalance": CommandBalance(command=mybalance.COMMAND, parse=mybalance.parse),
    "showusage": CommandBalance(command=showusage.COMMAND, parse=showusage.parse),
    "taccinfo": CommandBalance(command=taccinfo.COMMAND, parse=taccinfo.parse),
}


def get_balance_source(site: SiteSpec, token: str | None = None) -> BalanceSource:
    """Return what a site's balances are asked of.

    Args:
        site: Its ``system.charge.balance`` says which it is.
        token: Of the facility's API, where it is one.

    Raises:
        SettingInvalid: The site's file does not say, or there is no token for an API.
    """
    charge = site.system.charge if site.system else None
    config = charge.balance if charge else None
    if config is None:
        by_hand = (
            f"; on its login node, `{charge.command}` tells" if charge and charge.command else ""
        )
        raise SettingInvalid(
            setting="system.charge.balance",
            value=None,
            reason=f"the file does not say how a balance is asked for{by_hand}",
            source=f"the file of {site.name}",
        )
    match config.kind:
        case "sbank":
            resource = str(config.resource)
            command = sbank.COMMAND.replace("{resource}", resource)
            return CommandBalance(command=command, parse=partial(sbank.parse, resource=resource))
        case "slurm":
            return SlurmBalance(since=config.since)
        case "iri":
            if token:
                return FacilityBalance(url=str(config.url), token=token, capability=config.resource)
            reason = f"the API at {config.url} wants a token of the facility; give it in a file"
            raise SettingInvalid(setting="token", value=token, reason=reason)
        case kind:
            return _BY_COMMAND[kind]
