"""What devices are able to do, from their makers' data sheets.

A device is what one rank runs on, so cards with two halves that jobs see as two devices (MI250X,
Max 1550) are listed by the half. A GB of a data sheet is taken as 10^9 bytes; drivers show a few
percent more of some. Rates are peaks, dense (without sparsity): bounds, not expectations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.errors import UnknownDevice
from fabric.planning.names import resolve

HERE = "here"
"""The name of this machine, which is measured (``fabric.planning.here``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of one rank.

    Args:
        name: As it is asked for.
        title: As people call it.
        memory_bytes: Its memory.
        memory_bytes_s: The rate at which it reads that memory.
        flops: Floating-point operations per second by the dtype that is multiplied.
        link_bytes_s: To another device of the node, in one direction.
        network_bytes_s: To another node, in one direction.
        devices_per_node: In the node it is mostly sold in.
        source: Where the figures come from.
    """

    name: str
    title: str
    memory_bytes: int
    memory_bytes_s: float
    flops: Mapping[str, float]
    link_bytes_s: float
    network_bytes_s: float
    devices_per_node: int
    source: str


def _device(
    name: str,
    title: str,
    gb: int,
    gb_s: float,
    tflops: tuple[float, float],
    links_gb_s: tuple[float, float],
    devices_per_node: int,
    source: str,
) -> Device:
    half, single = (rate * 1e12 for rate in tflops)
    return Device(
        name=name,
        title=title,
        memory_bytes=gb * 10**9,
        memory_bytes_s=gb_s * 1e9,
        flops={"bf16": half, "fp16": half, "fp32": single},
        link_bytes_s=links_gb_s[0] * 1e9,
        network_bytes_s=links_gb_s[1] * 1e9,
        devices_per_node=devices_per_node,
        source=source,
    )


_LISTED = (
    # name, title, GB, GB/s, TFLOP/s in (bf16, fp32), GB/s to (node, network), in a node, source
    _device(
        *("H200", "NVIDIA H200 SXM", 141, 4800, (989, 67), (450, 50), 8),
        "NVIDIA H200 data sheet (NVLink 900 GB/s is both directions); 400 Gb/s for each device",
    ),
    _device(
        *("H100-80", "NVIDIA H100 SXM 80 GB", 80, 3350, (989, 67), (450, 50), 4),
        "NVIDIA H100 data sheet (NVLink 900 GB/s is both directions); 400 Gb/s for each device",
    ),
    _device(
        *("GH200", "NVIDIA GH200 96 GB", 96, 4000, (990, 67), (150, 25), 1),
        "NVIDIA GH200 data sheet; nodes of four give a pair 300 GB/s both ways; 200 Gb/s",
    ),
    _device(
        *("A100-80", "NVIDIA A100 SXM 80 GB", 80, 2039, (312, 19.5), (300, 25), 4),
        "NVIDIA A100 data sheet (NVLink 600 GB/s is both directions); 200 Gb/s for each device",
    ),
    _device(
        *("A100-40", "NVIDIA A100 SXM 40 GB", 40, 1555, (312, 19.5), (300, 25), 4),
        "NVIDIA A100 data sheet (NVLink 600 GB/s is both directions); 200 Gb/s for each device",
    ),
    _device(
        *("MI250X", "AMD MI250X, one of two GCDs", 64, 1638.4, (191.5, 23.95), (50, 12.5), 8),
        "AMD MI250X data sheet, halved; links: OLCF Frontier User Guide (50 GB/s is the slowest"
        " pair, a 200 Gb/s card for two GCDs)",
    ),
    _device(
        *("MAX1550", "Intel Max 1550, one of two tiles", 64, 1638.4, (419.5, 26.2), (26.5, 16), 12),
        "Intel Data Center GPU Max 1550 product brief, halved; one Xe Link between cards; eight"
        " 200 Gb/s cards for twelve tiles",
    ),
    _device(
        *("GRACE", "NVIDIA Grace CPU Superchip, a node", 240, 1024, (56.8, 14.2), (25, 25), 1),
        "NVIDIA Grace data sheet: 7.1 TFLOP/s in fp64, twice that in fp32; bf16 counted as four"
        " times fp32, the most its matrix instructions allow; 200 Gb/s",
    ),
    _device(
        *("EPYC-7763", "2 x AMD EPYC 7763, a node", 256, 409.6, (10.0, 10.0), (25, 25), 1),
        "AMD EPYC 7763 data sheet: 128 cores, 2.45 GHz, 32 operations a cycle; 204.8 GB/s a socket;"
        " no bf16 instructions; 200 Gb/s",
    ),
)

DEVICES: Mapping[str, Device] = {device.name: device for device in _LISTED}

_ALIASES = {
    "h100": "H100-80",
    "a100": "A100-80",
    "pvc": "MAX1550",
    "max-1550": "MAX1550",
    "epyc": "EPYC-7763",
}


def find_device(name: str) -> Device:
    """Return a listed device; case does not matter.

    Raises:
        UnknownDevice: No device is called that; says which are, and which is nearest.
    """
    aliases = {alias: DEVICES[target] for alias, target in _ALIASES.items()}
    device, nearest = resolve(name, DEVICES, aliases)
    if device is None:
        raise UnknownDevice(device=name, known=[*DEVICES, HERE], nearest=nearest)
    return device
