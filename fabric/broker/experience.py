"""What attempts have shown, and what choices after them rest on."""

from __future__ import annotations

from dataclasses import replace

from fabric.broker.coming import Arrivals
from fabric.broker.cost import expected_tokens, length_s, times_s
from fabric.broker.facts import Context, ReplicaSnapshot
from fabric.broker.hedge import Waits
from fabric.broker.lengths import Lengths
from fabric.broker.links import Links
from fabric.broker.own import get_kept_by
from fabric.broker.progress import Progress
from fabric.broker.replicas import Fleet
from fabric.broker.settings import BrokerSettings
from fabric.messages import Finished, Request

SILENCE_FACTOR = 4.0


class Experience:
    """Running means of waits, transfers and answers' lengths.

    Args:
        settings: Limits.
        fleet: Hears how replicas did.
        arrivals: The replicas that are on their way.
        waits: How long first answers take.
        lengths: Where the lengths of answers are noted.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        fleet: Fleet,
        arrivals: Arrivals,
        waits: Waits,
        lengths: Lengths | None,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._arrivals = arrivals
        self._waits = waits
        self._lengths = lengths or Lengths()
        self._links = Links()

    def informed(self, now: float, request: Request, context: Context) -> Context:
        """Return what a choice rests on with the time and what was observed."""
        links, lengths = self._links.bytes_per_s, self._lengths
        return self._awaiting(
            request, replace(context, now=now, bandwidths_bytes_per_s=links, lengths=lengths)
        )

    def context(self, run: Progress, now: float) -> Context:
        """Return what the next choice for a run rests on."""
        offers = run.ticket.offers
        if run.refused_sites:
            offers = {site: one for site, one in offers.items() if site not in run.refused_sites}
        context = Context(
            model=run.ticket.model,
            digest=run.ticket.digest,
            offers=offers,
            remaining_s=run.deadline_at - now,
            settings=self._settings,
            held_allocation=run.held_allocation,
            held_usu=run.held_usu,
            tried=frozenset(run.tried if run.instance is None else {*run.tried, run.instance}),
            now=now,
            bandwidths_bytes_per_s=self._links.bytes_per_s,
            lengths=self._lengths,
            hidden=run.ticket.hidden,
            own={site: keeps for site, keeps in run.own.items() if site in offers},
        )
        return self._awaiting(run.ticket.request, context)

    def keep(self, run: Progress, now: float) -> None:
        """Note how long a run is that has just been admitted, and what keeps it. One that is free
        now stays so, for it waits among others that are."""
        tokens = expected_tokens(run.ticket.request, self._lengths)
        self._lengths.came(run.ticket.digest, length_s(tokens))
        run.own = run.ticket.own
        if run.own and not self.context(run, now).kept_by:
            run.own = {}

    def _awaiting(self, request: Request, context: Context) -> Context:
        """Add the replicas on their way, and the caller's own sites that keep the request."""
        if self._arrivals:
            context = replace(context, coming=self._arrivals.of(context, context.now))
        if context.own:
            pool = self._fleet.pool(context.now)
            kept_by = get_kept_by(request, context, pool, self._arrivals)
            context = replace(context, kept_by=kept_by)
        return context

    def silent_until(self, run: Progress, chosen: ReplicaSnapshot, now: float) -> float | None:
        """Return when a replica is given up for a run if it says nothing; one that cannot stream
        is waited for."""
        replica = self._fleet.get(chosen.instance)
        if replica is None or not replica.streams:
            return None
        expected_s = times_s(run.ticket.request, chosen, self._lengths).total_s
        return now + max(self._settings.first_token_timeout_s, SILENCE_FACTOR * expected_s)

    def observe(self, run: Progress, now: float, finished: Finished) -> None:
        """Learn from an attempt that came to its end."""
        instance, request = run.instance or "", run.ticket.request
        self._fleet.succeeded(instance)
        if request.mode == "query" and run.num_tokens:
            self._lengths.observe(request.sampling.max_tokens, run.num_tokens / len(run.counts))
        if run.attempt_first_at is None or run.held_back or run.ticket.bounds is not None:
            return
        self._waits.observe(run.attempt_first_at - run.sent_at, run.expected_s)
        if (moved := run.transfer()) is not None:
            self._links.observe(*moved)
        self._fleet.observed(
            now,
            instance,
            prompt_tokens=run.prompt_tokens,
            first_token_s=run.first_token_s(),
            decode_tokens_per_s=run.decode_tokens_per_s(),
            ratio=run.observed_over_predicted(now),
            cached_tokens=finished.usage.cached_prompt_tokens,
        )
