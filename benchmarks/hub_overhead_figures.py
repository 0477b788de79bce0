"""What the hub's benchmark says of its samples: percentiles, differences, a line of its table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds to its first token (streams only) and to its end."""

    first_s: float
    total_s: float


def percentiles(values: list[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {name: cuts[int(name[1:]) - 1] * 1e3 for name in ("p50", "p95", "p99")}


def summarize(
    num_clients: int,
    stream: bool,
    samples: dict[str, list[list[Sample]]],
    cpu_s: dict[str, float],
) -> dict[str, object]:
    """Return one row: percentiles of each way, their differences, and the spread over rounds."""
    hub = compare(samples["direct"], samples["hub"], stream)
    row = {
        "clients": num_clients,
        "measure": "first token" if stream else "whole answer",
        "num_requests": sum(map(len, samples["hub"])),
        "direct_ms": hub["without_ms"],
        "hub_ms": hub["with_ms"],
        "added_ms": hub["added_ms"],
        "ratio_p50": hub["with_ms"]["p50"] / hub["without_ms"]["p50"],
        "added_p50_ms_by_round": hub["added_p50_ms_by_round"],
        "added_p99_ms_by_round": hub["added_p99_ms_by_round"],
        "cpu_ms_per_request": cpu_s["hub"] * 1e3 / count(samples["hub"], num_clients),
    }
    if "litellm" in samples:
        peer = compare(samples["upstream"], samples["litellm"], stream)
        ratios = [
            ours / theirs
            for ours, theirs in zip(
                hub["added_p99_ms_by_round"], peer["added_p99_ms_by_round"], strict=True
            )
        ]
        row |= {
            "litellm": peer
            | {
                "cpu_ms_per_request": cpu_s["litellm"]
                * 1e3
                / count(samples["litellm"], num_clients)
            },
            "ratio_added_p99": hub["added_ms"]["p99"] / peer["added_ms"]["p99"],
            "ratio_added_p99_by_round": ratios,
        }
    return row


def count(parts: list[list[Sample]], num_clients: int) -> int:
    """Return the requests of all rounds, with the one by which each client begins."""
    return sum(len(part) + num_clients for part in parts)


def compare(without: list[list[Sample]], through: list[list[Sample]], stream: bool):
    """Return the percentiles of two ways in milliseconds, and by how much the second is slower."""

    def of(part: list[Sample]) -> list[float]:
        return [s.first_s if stream else s.total_s for s in part]

    before = percentiles([value for part in without for value in of(part)])
    after = percentiles([value for part in through for value in of(part)])
    rounds = [
        (percentiles(of(one)), percentiles(of(other)))
        for one, other in zip(without, through, strict=True)
    ]
    return {
        "without_ms": before,
        "with_ms": after,
        "added_ms": {name: after[name] - before[name] for name in after},
        "added_p50_ms_by_round": [other["p50"] - one["p50"] for one, other in rounds],
        "added_p99_ms_by_round": [other["p99"] - one["p99"] for one, other in rounds],
    }


def print_row(row: dict[str, object]) -> None:
    """Print one line of the table."""
    added, hub = row["added_ms"], row["hub_ms"]
    print(
        f"{row['clients']:>7}  {row['measure']:<12}  {row['num_requests']:>8}"
        + "".join(f"  {added[name]:>7.2f}" for name in added)
        + f"  {statistics.median(row['added_p99_ms_by_round']):>9.2f}"
        + f"  {hub['p99']:>9.1f}  {row['ratio_p50']:>6.3f}  {row['cpu_ms_per_request']:>6.2f}",
        flush=True,
    )
    if "litellm" in row:
        peer = row["litellm"]
        print(
            " " * 9
            + f"{'litellm':<22}"
            + "".join(f"  {peer['added_ms'][name]:>7.2f}" for name in added)
            + f"  {statistics.median(peer['added_p99_ms_by_round']):>9.2f}"
            + f"  {peer['with_ms']['p99']:>9.1f}  {'':>6}  {peer['cpu_ms_per_request']:>6.2f}"
            f"   added p99, hub/litellm: {row['ratio_added_p99']:.3f}",
            flush=True,
        )
