"""How the broker behaves; every number has a unit in its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """Settings of the broker.

    Args:
        max_attempts: Replicas one request may be sent to, one after the other.
        retry_ratio: Retries the fleet may make for each admitted request.
        retry_burst: Retries saved up at most, so that the loss of a site under a light load is
            made good at once.
        retry_min_per_s: Retries that come back with time alone, however few requests arrive.
        first_token_timeout_s: Silence after which a streaming replica is given up; stretched to
            four times what was expected of it, so that a long queue is not taken for a hang.
        patience_s: How long a request waits for a replica that may come back.
        cancel_grace_s: How long a cancelled replica may take to say what it consumed.
        eject_after: Failures in a row that take a replica out; never more than half of those that
            serve one digest.
        eject_s: How long it stays out before one request tries it again.
        hedge_quantile: Share of the attempts that have said something by when a second is sent
            beside a silent one; 1 sends none.
        hedge_min_s: How long every attempt may be silent before that.
        hedge_samples: Attempts that must have been seen before any is taken for slow.
        lost_memory_s: How long a lost replica is expected back.
        lease_s: How long a hold outlives a hub that no longer renews it.
        sweep_s: How often holds whose lease ran out are released.
        facts_ttl_s: How old prices and balances may be when a request is admitted. A refusal
            always rests on fresh ones, and the hold itself is decided by the ledger.
        tick_s: Resolution of all time limits.
        backlog_events: Events that may wait for a slow client before its replica is held back.
        window_events: Token events a replica may send before it gets credit.
        bandwidth_bytes_per_s: Rate at which data moves between sites.
        bandwidths_bytes_per_s: The same where it is known better: from a site, to others.
        locality_penalty_s: Fixed price of running away from the data.
        seconds_per_su: What a service unit is worth in seconds of waiting, to a request of usual
            length: at a site file's usual price an output token's charge is then 22 ms, about the
            time that it takes.
        worth_power: A request's expected length over the usual one, to this power, divides that;
            0 leaves it as it is.
        worth_range: By how much it is divided at least and at most.
        tie_s: Expected seconds that make no difference; the less busy replica gets the request.
        prefix_tokens: Tokens at the beginning of a prompt by which it finds replicas that may have
            computed them before; a shorter prompt looks for none.
        prefix_replicas: How many replicas one beginning is sent to by preference.
        prefix_hit: How likely one of them has it still.
        explore: Share of the requests that try another replica than the best.
        fair: Whether the hub keeps a line: a replica gets about as many attempts as it has rows,
            and who is next is decided by what each project and tier was given.
        rows_ahead: Attempts beyond its rows that a replica gets, as a part of them, so that no row
            is idle while the next attempt and its data are on their way.
        blind_factor: How many times its rows a replica may have whose channel does not tell at once
            when one is free.
        batch_share: The part of a replica's rows that batch work may take, if nobody else does.
        introspection_share: The part that programs may take.
        project_weights: How much of the whole is a project's, relative to others; 1 by default.
        max_waiting: Requests that may wait for one version, whatever is predicted.
        max_table: Replicas up to which a placement tells of each; of a larger fleet it tells the
            best of each site, and how many the others are.
    """

    max_attempts: int = 3
    retry_ratio: float = 0.2
    retry_burst: float = 32.0
    retry_min_per_s: float = 2.0
    first_token_timeout_s: float = 30.0
    patience_s: float = 10.0
    cancel_grace_s: float = 2.0
    eject_after: int = 5
    eject_s: float = 10.0
    hedge_quantile: float = 0.95
    hedge_min_s: float = 1.0
    hedge_samples: int = 100
    lost_memory_s: float = 60.0
    lease_s: float = 60.0
    sweep_s: float = 10.0
    facts_ttl_s: float = 1.0
    tick_s: float = 0.1
    backlog_events: int = 256
    window_events: int = 256
    bandwidth_bytes_per_s: float = 100e6
    bandwidths_bytes_per_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    locality_penalty_s: float = 1.0
    seconds_per_su: float = 550.0
    worth_power: float = 1.5
    worth_range: tuple[float, float] = (0.5, 3.0)
    tie_s: float = 0.05
    prefix_tokens: int = 256
    prefix_replicas: int = 2
    prefix_hit: float = 0.5
    explore: float = 0.01
    fair: bool = True
    rows_ahead: float = 0.2
    blind_factor: int = 4
    batch_share: float = 0.75
    introspection_share: float = 0.5
    project_weights: Mapping[str, float] = field(default_factory=dict)
    max_waiting: int = 10_000
    max_table: int = 32
