"""What one replica would cost a request, in expected seconds, and what keeps it from serving.

This is the formula in words and for one replica, as the table of a placement tells it;
``fabric.broker.rank`` computes the same for all at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fabric.broker.facts import Context, ReplicaSnapshot
from fabric.broker.lengths import Lengths
from fabric.broker.policies import get_weights
from fabric.broker.pool import (
    MIN_TOKENS_PER_S,
    PRIOR_DECODE_TOKENS_PER_S,
    PRIOR_PREFILL_TOKENS_PER_S,
)
from fabric.broker.settings import BrokerSettings
from fabric.messages import (
    ChatInput,
    InstanceState,
    Program,
    ProgramInput,
    Request,
    TextInput,
    TokensInput,
)

PRIOR_OUTPUT_TOKENS = 128
BYTES_PER_TOKEN = 4
FAILURE_S = 2.0
TRIED_S = 30.0
HELD_UP = 2.5
"""What a second in line counts where a row is free elsewhere: those behind wait for it too.
Found in simulation, where 1 left rows idle at an overload."""

_NOTHING: Mapping[str, float] = {}
_WITHOUT = {"embed": "it does not embed", "program": "it runs no programs"}


def expected_tokens(request: Request, lengths: Lengths | None = None) -> tuple[int, int]:
    """Return the likely number of prompt tokens and of output tokens of one choice, by what was
    observed of answers if that is given."""
    if isinstance(request.input, ProgramInput):
        return _expected_of_program(request.input.program)
    prompt = request.prompt_tokens_bound()
    if not isinstance(request.input, TokensInput):
        prompt = prompt // BYTES_PER_TOKEN + 1
    wanted = request.sampling.max_tokens
    likely = None if lengths is None else lengths.expected(wanted)
    if likely is None:
        likely = PRIOR_OUTPUT_TOKENS
    return prompt, likely if wanted is None else min(wanted, likely)


def length_s(tokens: tuple[int, int]) -> float:
    """Return how long so many tokens of prompt and output are, wherever they run: the seconds at a
    replica of which nothing is known."""
    return tokens[0] / PRIOR_PREFILL_TOKENS_PER_S + tokens[1] / PRIOR_DECODE_TOKENS_PER_S


def _expected_of_program(program: Program) -> tuple[int, int]:
    """Return the likely tokens of all prompts, and of the longest run: runs go side by side."""
    prompts = (len(run.ids or (run.text or "")[::BYTES_PER_TOKEN]) for run in program.runs)
    return sum(prompts) + 1, max(run.gen.max_tokens for run in program.runs)


def known_length(request: Request) -> int | None:
    """Return prompt and output in tokens; text is counted by the instance, which then says so."""
    if not isinstance(request.input, TokensInput):
        return None
    return len(request.input.ids) + (request.sampling.max_tokens or 0)


def prefix_key(request: Request, digest: str, num_tokens: int) -> bytes:
    """Return what requests for the same version that begin with the same tokens share.

    Those of an adapter share it whatever they begin with: they gather where it is loaded.
    """
    if request.adapter is not None:
        return blake2b(f"{digest}+{request.adapter}".encode(), digest_size=16).digest()
    match request.input:
        case TokensInput(ids=ids):
            begin = repr(ids[:num_tokens])
        case TextInput(text=text):
            begin = text[: num_tokens * BYTES_PER_TOKEN]
        case ChatInput(messages=messages):
            whole = "\0".join(f"{one.role}:{one.content}" for one in messages)
            begin = whole[: num_tokens * BYTES_PER_TOKEN]
        case ProgramInput(program=program):
            begin = repr((program.runs[0].text, program.runs[0].ids))[:num_tokens]
    return blake2b(f"{digest}/{begin}".encode(), digest_size=16).digest()


def lasting(
    request: Request,
    snapshot: ReplicaSnapshot,
    context: Context,
    *,
    ends_in_s: float | None = None,
) -> str | None:
    """Return what keeps the replica from ever serving the request, if anything does.

    ``ends_in_s`` is until its block ends, where that is known better than by the snapshot.
    """
    if snapshot.digest != context.digest:
        return "it serves another model version"
    if (barred := barred_site(request, snapshot.site, context)) is not None:
        return barred
    if (missing := unable(request, snapshot)) is not None:
        return missing
    if ends_in_s is None:
        ends_in_s = math.inf if snapshot.ends_in_s is None else snapshot.ends_in_s
    return _too_late(request, snapshot, context, ends_in_s)


def unable(request: Request, snapshot: ReplicaSnapshot) -> str | None:
    """Return what the request needs that the replica has not, if anything."""
    if request.mode not in snapshot.modes:
        return _WITHOUT[request.mode] if "query" in snapshot.modes else "it only embeds"
    if request.adapter is not None and not snapshot.adapters:
        return "it serves no adapters"
    if request.sampling.n > snapshot.max_rows:
        return f"{request.sampling.n} choices are asked for and it runs {snapshot.max_rows} rows"
    if (length := known_length(request)) is not None and length > snapshot.context_tokens:
        return f"its context is {snapshot.context_tokens} tokens and {length} are needed"
    return None


def passing(snapshot: ReplicaSnapshot) -> str | None:
    """Return what keeps the replica from serving now, if anything does."""
    if snapshot.state is InstanceState.LOST:
        return "its session was lost and may come back"
    if snapshot.state is not InstanceState.READY:
        return f"it is {snapshot.state.value}"
    if snapshot.ejected:
        return "it is out after failures in a row"
    return None


def barred_site(request: Request, site: str, context: Context) -> str | None:
    """Return what keeps all of a site from the request, if anything does."""
    if request.sites is not None and site not in request.sites:
        return f"the request may run only at {', '.join(request.sites)}"
    if request.policy == "local-only" and site != request.data_site:
        return f"its data may not leave {request.data_site}"
    if context.keeps_from(site):
        kept_by = ", ".join(context.kept_by)
        return f"your own instances keep it ({kept_by}); `overflow` lets it leave them"
    offer = context.offers.get(site)
    if offer is None:
        why = "it is disabled, no price is set there, or the project's data stays elsewhere"
        return f"{site} takes no requests: {why}"
    if offer.allocation is None:
        return f"the project has no allocation for {site}"
    held_usu = context.held_usu if offer.allocation == context.held_allocation else 0
    available_usu = offer.available_usu + held_usu
    if available_usu < offer.max_charge_usu:
        return (
            f"the allocation {offer.allocation!r} has {available_usu} micro-SU available and up to"
            f" {offer.max_charge_usu} may be needed"
        )
    if offer.closures and (closure := offer.closed_at(context.now)) is not None:
        return f"{site} is in maintenance until {closure.until:%Y-%m-%d %H:%M} UTC"
    return None


def full_site(site: str, num_in_flight: int, context: Context) -> str | None:
    """Return what keeps a site with so many requests from taking another now, if anything does."""
    offer = context.offers.get(site)
    if offer is None or offer.max_in_flight is None or num_in_flight < offer.max_in_flight:
        return None
    return f"{site} takes {offer.max_in_flight} requests at once and has as many"


def data_s(request: Request, site: str, context: Context) -> float:
    """Return the seconds to bring the request's data to a site, by what was observed of the pair,
    else by what the settings say."""
    home = request.data_site
    if home is None or home == site:
        return 0.0
    (rate,) = rates_from(home, (site,), context)
    return context.settings.locality_penalty_s + request.data_bytes / rate


def rates_from(home: str, sites: Sequence[str], context: Context) -> list[float]:
    """Return the bytes per second from one site to others, as observed of each pair, else as the
    settings say."""
    settings, usual = context.settings, context.settings.bandwidth_bytes_per_s
    known = settings.bandwidths_bytes_per_s.get(home, _NOTHING)
    seen = context.bandwidths_bytes_per_s.get(home, _NOTHING)
    rates = {**known, **seen}
    return [rates.get(site, usual) for site in sites]


def seconds_per_su(tokens: tuple[int, int], context: Context) -> float:
    """Return what a service unit is worth to a request of so many expected tokens: the less, the
    longer it is than usual.

    A request's seconds and its charge both grow with its length, so with one worth for all a long
    one would go where a short one goes, though it is the long ones that are waited for.
    """
    settings = context.settings
    usual_s = None if context.lengths is None else context.lengths.usual_s(context.digest)
    if not usual_s:
        return settings.seconds_per_su
    least, most = settings.worth_range
    ratio = math.pow(length_s(tokens) / usual_s, settings.worth_power)
    return settings.seconds_per_su / min(most, max(least, ratio))


def price_s(request: Request, site: str, context: Context) -> float:
    """Return the charge at a site in seconds: more where the balance is scarce."""
    tokens = expected_tokens(request, context.lengths)
    return context.offers[site].price_su * seconds_per_su(tokens, context)


def cost_s(
    request: Request, snapshot: ReplicaSnapshot, context: Context, *, saved_s: float = 0.0
) -> dict[str, float]:
    """Return the weighted parts of the expected cost; ``saved_s`` of the prompt is there already.

    ``cold`` is told only of a replica that may have to be started, and weighs as ``queue`` does.
    """
    times = times_s(request, snapshot, context.lengths)
    weights = get_weights(request)
    parts = {
        "queue": times.queue_s,
        "service": times.first_s + times.rest_s - saved_s,
        "data": data_s(request, snapshot.site, context),
        "price": price_s(request, snapshot.site, context),
        "risk": FAILURE_S * snapshot.failures
        + (TRIED_S if snapshot.instance in context.tried else 0.0),
    }
    weighted = {name: round(weights[name] * seconds, 6) for name, seconds in parts.items()}
    if snapshot.cold_s:
        weighted["cold"] = round(weights["queue"] * snapshot.cold_s, 6)
    return weighted


@dataclass(frozen=True, slots=True)
class Times:
    """Expected seconds: until it is started, waiting for a row, until the first token, and from it
    to the last. ``share`` of the last two is lost to others."""

    cold_s: float
    wait_s: float
    first_s: float
    rest_s: float
    share: float

    @property
    def queue_s(self) -> float:
        """Waiting for a row and for the others that share the engine."""
        return self.wait_s + self.share * (self.first_s + self.rest_s)

    @property
    def total_s(self) -> float:
        """From now to the last token."""
        return self.cold_s + self.queue_s + self.first_s + self.rest_s


def times_s(
    request: Request,
    snapshot: ReplicaSnapshot,
    lengths: Lengths | None = None,
    *,
    output_tokens: int | None = None,
) -> Times:
    """Rows share the engine, so each busy one slows the others; beyond ``max_rows`` they wait."""
    prompt_tokens, likely_tokens = expected_tokens(request, lengths)
    if output_tokens is None:
        output_tokens = likely_tokens
    prefill_tokens_per_s = snapshot.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
    decode_tokens_per_s = snapshot.decode_tokens_per_s or PRIOR_DECODE_TOKENS_PER_S
    first_s = snapshot.overhead_s + prompt_tokens / max(MIN_TOKENS_PER_S, prefill_tokens_per_s)
    rest_s = output_tokens / max(MIN_TOKENS_PER_S, decode_tokens_per_s)
    first_s, rest_s = first_s * snapshot.correction, rest_s * snapshot.correction
    num_waiting = max(0, snapshot.num_busy + request.sampling.n - snapshot.max_rows)
    return Times(
        cold_s=snapshot.cold_s,
        wait_s=(first_s + rest_s) * num_waiting / snapshot.max_rows,
        first_s=first_s,
        rest_s=rest_s,
        share=min(snapshot.num_busy, snapshot.max_rows) / snapshot.max_rows,
    )


def saved_s(snapshot: ReplicaSnapshot, settings: BrokerSettings) -> float:
    """Return the seconds that a replica which may have a prompt's beginning is expected to save."""
    rate = snapshot.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
    tokens = settings.prefix_hit * settings.prefix_tokens
    return tokens * snapshot.correction / max(MIN_TOKENS_PER_S, rate)


def _too_late(
    request: Request, snapshot: ReplicaSnapshot, context: Context, ends_in_s: float
) -> str | None:
    """Refuse what is hopeless: the length of the output is a guess, the first token is not."""
    times = times_s(request, snapshot, context.lengths)
    first_s = times.cold_s + times.wait_s + times.first_s
    if first_s > context.remaining_s:
        return (
            f"its first token is expected in {first_s:.1f} s and the deadline is in"
            f" {context.remaining_s:.1f} s"
        )
    total_s = times.total_s
    if total_s > ends_in_s:
        return f"its block ends in {ends_in_s:.0f} s"
    offer = context.offers[snapshot.site]
    if offer.closures and total_s > (closes_in_s := offer.closes_in_s(context.now)):
        return f"maintenance of {snapshot.site} begins in {closes_in_s:.0f} s"
    return None
