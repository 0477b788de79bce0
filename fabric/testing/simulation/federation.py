"""Ten machines as their centres describe them, each serving one model a device.

Devices, nodes and charges are those of the shipped site files, the devices' rates those of their
data sheets (``fabric.planning``). What no centre publishes is assumed and named here: how much of a
data sheet an engine reaches, how large a batch is, how long queues are and what links carry.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from fabric.config import SiteSpec, System, load_site, shipped_sites
from fabric.planning import find_device
from fabric.testing.simulation.world import SiteSketch, World

PARAMETERS = 8e9
"""Of the model, in bf16: the largest usual size that fits every device here."""
READ_SHARE = 0.6
"""Of the memory's rate, reached when one row generates."""
COMPUTE_SHARE = 0.5
"""Of the peak, reached when a prompt is read."""
START_WAIT_S = 600.0
LOAD_BYTES_PER_S = 0.5e9
SAME_CENTRE_BYTES_PER_S = 2e9
BEHIND_PROXY_BYTES_PER_S = (50e6, 100e6, 200e6)
DIRECT_BYTES_PER_S = (200e6, 500e6, 825e6)
"""The last is the 6.6 Gbit/s that were measured between centres for weights."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A site's nodes, the queue that charges for them, and the data sheet of their device."""

    site: str
    nodes: str
    queue: str
    device: str


MACHINES = (
    Machine("alcf-aurora", "gpu", "capacity", "MAX1550"),
    Machine("alcf-polaris", "gpu", "capacity", "A100-40"),
    Machine("alcf-sophia", "gpu", "by-gpu", "A100-40"),
    Machine("ncsa-delta", "a100x4", "gpuA100x4", "A100-40"),
    Machine("ncsa-deltaai", "gh", "ghx4", "GH200"),
    Machine("nersc-perlmutter", "gpu", "regular", "A100-40"),
    Machine("olcf-frontier", "gpu", "batch", "MI250X"),
    Machine("purdue-anvil", "gpu", "gpu", "A100-40"),
    Machine("tacc-stampede3", "h100", "h100", "H100-80"),
    Machine("tacc-vista", "gh", "gh", "GH200"),
)
"""Every shipped site of the United States whose devices have a data sheet and hold the model, in
order of name, which is the order of a catalog."""


def units_per_device_hour(machine: Machine) -> float:
    """Return what a device costs for an hour, in the centre's own unit, taken as one SU."""
    system = _system(machine)
    nodes, queue = system.nodes[machine.nodes], system.queues[machine.queue]
    num_devices = (nodes.devices or 1) * nodes.device_parts
    if queue.units_per_node_hour is not None:
        return queue.units_per_node_hour / num_devices
    if system.charge is not None and system.charge.unit == "node-hour":
        return 1.0 / num_devices
    return queue.charge_factor or 1.0


def make_federation(
    replicas_per_site: int = 8, *, seed: int = 1, mtbf_s: float | None = 3_600.0
) -> World:
    """Return the machines as sites.

    A token's price is the seconds of its device that it takes, in a full batch, at the centre's
    charge. All are scaled alike, so that an output token costs as much on average as a site file's
    default: what a service unit is worth in seconds was chosen for that.

    Args:
        replicas_per_site: Mean number of devices that serve at a site.
        seed: Of sizes, queues, batches and links, which no centre publishes.
        mtbf_s: Mean seconds until a replica is lost, if it ever is.
    """
    drawn = random.Random(seed)  # noqa: S311
    sites = [_sketch(machine, replicas_per_site, mtbf_s, drawn) for machine in MACHINES]
    usual_usu = SiteSpec(name="usual").prices.output_usu
    scale = usual_usu / fmean(site.output_usu for site in sites)
    return World(
        sites=tuple(site.priced(scale) for site in sites),
        bandwidths_bytes_per_s={
            source.site: {
                target.site: _link(source, target, drawn) for target in MACHINES if source != target
            }
            for source in MACHINES
        },
    )


def _sketch(
    machine: Machine, replicas_per_site: int, mtbf_s: float | None, drawn: random.Random
) -> SiteSketch:
    device = find_device(machine.device)
    decode_tokens_per_s = READ_SHARE * device.memory_bytes_s / (2 * PARAMETERS)
    prefill_tokens_per_s = COMPUTE_SHARE * device.flops["bf16"] / (2 * PARAMETERS)
    max_rows, slowdown = drawn.choice([8, 16]), drawn.uniform(0.5, 1.5)
    num_replicas = max(1, round(replicas_per_site * drawn.uniform(0.5, 1.5)))
    usu_per_device_s = units_per_device_hour(machine) * 1e6 / 3_600
    return SiteSketch(
        name=machine.site,
        num_replicas=num_replicas,
        max_rows=max_rows,
        prefill_tokens_per_s=prefill_tokens_per_s,
        decode_tokens_per_s=decode_tokens_per_s,
        slowdown=slowdown,
        prompt_usu=usu_per_device_s / prefill_tokens_per_s,
        output_usu=usu_per_device_s * (1.0 + slowdown) / (max_rows * decode_tokens_per_s),
        start_wait_s=drawn.expovariate(1 / START_WAIT_S),
        load_s=2 * PARAMETERS / LOAD_BYTES_PER_S,
        num_cold=num_replicas // 4,
        mtbf_s=mtbf_s,
    )


def _link(source: Machine, target: Machine, drawn: random.Random) -> float:
    systems = _system(source), _system(target)
    if systems[0].center == systems[1].center:
        return SAME_CENTRE_BYTES_PER_S
    behind_proxy = any(one.network.outbound == "proxy" for one in systems)
    return drawn.choice(BEHIND_PROXY_BYTES_PER_S if behind_proxy else DIRECT_BYTES_PER_S)


@cache
def _system(machine: Machine) -> System:
    system = load_site(shipped_sites()[machine.site]).system
    assert system is not None
    return system
