"""Chooses a split: as many copies as there is room for, each as fast as it can be."""

from __future__ import annotations

import dataclasses
import itertools

from fabric.planning.bounds import get_bounds
from fabric.planning.memory import RESERVE_FRACTION, activation_bytes
from fabric.planning.model_shape import ModelShape
from fabric.planning.split import Machine, Split, get_split, layer_bytes, ranks_of
from fabric.planning.workload import LARGEST_COUNT, Workload


def choose_split(shape: ModelShape, work: Workload, machine: Machine) -> Split | None:
    """Return the split to use, or ``None`` if no split fits.

    Of all splits that fit, those come first of which the machine holds most copies: two copies
    answer more than one copy on twice the devices. Of these, the one with the highest bound on a
    row's tokens a second wins, and among equals the one with the fewest devices.
    """
    candidates = _candidates(shape, work, machine)
    for _, group in itertools.groupby(candidates, lambda degrees: _num_copies(degrees, machine)):
        splits = [_get(shape, work, degrees) for degrees in group]
        fitting = [split for split in splits if does_fit(shape, work, split, machine)]
        if fitting:
            return max(fitting, key=lambda split: _merit(shape, work, split, machine))
    return None


def can_split(shape: ModelShape, work: Workload, machine: Machine) -> bool:
    """Return whether any split fits."""
    return any(
        does_fit(shape, work, _get(shape, work, degrees), machine)
        for degrees in _candidates(shape, work, machine)
    )


def fewest_nodes(shape: ModelShape, work: Workload, machine: Machine) -> int | None:
    """Return how many nodes like those of a machine it takes, ``None`` if no number does."""
    many = dataclasses.replace(machine, num_nodes=len(shape.layers))
    needed = (
        -(-pipeline // (machine.devices_per_node // tensor))
        for tensor, pipeline in sorted(
            _candidates(shape, work, many), key=lambda d: d[1] / (machine.devices_per_node // d[0])
        )
        if does_fit(shape, work, _get(shape, work, (tensor, pipeline)), many)
    )
    return next(needed, None)


def does_fit(shape: ModelShape, work: Workload, split: Split, machine: Machine) -> bool:
    """Return whether every rank of a split fits its device."""
    device_bytes = machine.device.memory_bytes
    ranks = ranks_of(shape, work, split, device_bytes)
    return all(rank.total_bytes <= device_bytes for rank in ranks)


def largest_batch(shape: ModelShape, work: Workload, split: Split, machine: Machine) -> int:
    """Return the most rows that a split's ranks could hold, 0 if not even one."""
    fits, too_many = 0, LARGEST_COUNT + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if does_fit(shape, dataclasses.replace(work, batch=middle), split, machine):
            fits = middle
        else:
            too_many = middle
    return fits


def _candidates(shape: ModelShape, work: Workload, machine: Machine) -> list[tuple[int, int]]:
    """Return tensor and pipeline degrees worth trying: most copies first, then fewest devices."""
    room = int(machine.device.memory_bytes * (1 - RESERVE_FRACTION))
    tried: list[tuple[int, int]] = []
    for tensor in shape.tensor_degrees(machine.devices_per_node):
        costs = layer_bytes(shape, work, tensor)
        fixed = activation_bytes(shape, work, list(shape.layers), tensor=tensor, is_last=False)
        if fixed + max(costs) > room:
            continue
        fewest, most = -(-sum(costs) // room), min(len(costs), machine.num_stages(tensor))
        tried += [(tensor, pipeline) for pipeline in range(fewest, most + 1)]
    return sorted(tried, key=lambda d: (-_num_copies(d, machine), d[0] * d[1], -d[0]))


def _num_copies(degrees: tuple[int, int], machine: Machine) -> int:
    return machine.num_copies(tensor=degrees[0], pipeline=degrees[1])


def _get(shape: ModelShape, work: Workload, degrees: tuple[int, int]) -> Split:
    return get_split(shape, work, tensor=degrees[0], pipeline=degrees[1])


def _merit(shape: ModelShape, work: Workload, split: Split, machine: Machine) -> tuple[float, int]:
    return get_bounds(shape, work, split, machine).decode_tokens_s_row, -split.num_ranks
