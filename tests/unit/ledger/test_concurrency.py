"""Ten thousand holds at once, from two hubs, on a balance for seven thousand of them."""

import subprocess
import sys

import pytest

from fabric.ledger import Ledger
from fabric.sql import Database

NUM_HOLDS, NUM_HUBS, GRANTED_USU = 10_000, 2, 7_000
HUB = """
import asyncio, sys
from fabric.errors import InsufficientBalance
from fabric.ledger import Ledger
from fabric.sql import Database, Offload

async def ask(offload, ledger, run):
    try:
        await offload.urgent(
            ledger.hold, run, allocation="allocation:astro:*", amount_usu=1, lease_s=3600
        )
    except InsufficientBalance:
        return False
    return True

async def main(url, name, num_holds):
    with Database(url) as database:
        offload = Offload(database)
        asked = (ask(offload, Ledger(database), f"{name}_{i}") for i in range(num_holds))
        print(sum(await asyncio.gather(*asked)))
        offload.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_thousand_holds_at_once_overspend_nothing_and_refuse_none_wrongly(
    database: Database, new_url: str
) -> None:
    ledger = Ledger(database)
    name = ledger.open_allocation("astro", "*")
    ledger.grant(name, GRANTED_USU)
    hubs = [
        subprocess.Popen(
            [sys.executable, "-c", HUB, new_url, f"hub{number}", str(NUM_HOLDS // NUM_HUBS)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(NUM_HUBS)
    ]
    admitted = [int(hub.communicate(timeout=280)[0]) for hub in hubs]
    assert sum(admitted) == GRANTED_USU
    left = ledger.allocation(name)
    assert (left.available_usu, left.held_usu) == (0, GRANTED_USU)
    ledger.verify()
