"""From a site's file to its source of balances."""

from __future__ import annotations

from fabric.config import SiteSpec
from fabric.errors import SettingInvalid
from fabric.launch.balances.accounts import AccountsBalance
from fabric.launch.balances.iri import FacilityBalance
from fabric.launch.balances.mybalance import MybalanceBalance
from fabric.launch.balances.protocol import BalanceSource
from fabric.launch.balances.sbank import SbankBalance
from fabric.launch.balances.showusage import ShowusageBalance
from fabric.launch.balances.slurm import SlurmBalance
from fabric.launch.balances.taccinfo import TaccinfoBalance


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
    if config.kind == "sbank":
        return SbankBalance(resource=str(config.resource))
    if config.kind == "accounts":
        return AccountsBalance()
    if config.kind == "showusage":
        return ShowusageBalance()
    if config.kind == "taccinfo":
        return TaccinfoBalance()
    if config.kind == "mybalance":
        return MybalanceBalance()
    if config.kind == "slurm":
        return SlurmBalance()
    if not token:
        reason = f"the API at {config.url} wants a token of the facility; give it in a file"
        raise SettingInvalid(setting="token", value=token, reason=reason)
    return FacilityBalance(url=str(config.url), token=token, capability=config.resource)
