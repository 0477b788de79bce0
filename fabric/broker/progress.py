"""One run as the state sees it: what was delivered, what holds its money, where it is now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fabric.broker.cost import times_s
from fabric.broker.facts import ReplicaSnapshot
from fabric.broker.hedge import Hedge
from fabric.broker.signals import Ticket
from fabric.errors import FabricError
from fabric.ledger import charge_usu
from fabric.messages import Embedding, Placement, RunState, Saves, Token, Usage
from fabric.messages.events import FinishReason


@dataclass(slots=True, kw_only=True)
class Progress:
    """A run between its admission and its end. Times are of the state's clock.

    ``instance`` is set while, and only while, an attempt is live there; ``moving_to`` while the
    hold is being moved for a placement; ``waiting_since`` is when the run last began to wait for a
    replica; ``in_line`` means that it has not had its turn yet; ``served_site`` is the last that
    delivered something; ``held_back`` means that a slow client, not the replica, set the pace;
    ``predicted`` is the replica as it was at ``sent_at``; ``saved`` are the runs of a program that
    have returned all they save. The choices of a program are its runs. ``attempt`` numbers the live
    attempt, of ``num_sent``; ``hedge`` is one beside it as long as neither has said anything, and
    is sent at ``hedge_at``; ``expected_s`` is when the first word was expected after ``sent_at``.
    ``own`` are the caller's own sites, if they kept the run when it came.
    """

    ticket: Ticket
    started_at: float
    deadline_at: float
    held_allocation: str
    held_usu: int
    waiting_since: float
    state: RunState = RunState.QUEUED
    attempt: int = 0
    num_sent: int = 0
    hedge: Hedge | None = None
    hedge_at: float = math.inf
    expected_s: float = 0.0
    instance: str | None = None
    placement: Placement | None = None
    served_site: str | None = None
    moving_to: Placement | None = None
    retry_at: float = 0.0
    seen_version: int = -1
    tried: set[str] = field(default_factory=set)
    refused_sites: set[str] = field(default_factory=set)
    own: Mapping[str, bool] = field(default_factory=dict)
    last_error: FabricError | None = None
    cancel_until: float | None = None
    silent_until: float | None = None
    sent_at: float = 0.0
    predicted: ReplicaSnapshot | None = None
    attempt_first_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0
    prompt_tokens: int = 0
    scored: bool = False
    embedded: bool = False
    saved: set[str] = field(default_factory=set)
    saved_bytes: int = 0
    has_saves: bool = False
    held_back: bool = False
    in_line: bool = False
    token_ids: list[int] = field(default_factory=list)
    num_before: int = 0
    counts: list[int] = field(init=False)
    finishes: list[FinishReason | None] = field(init=False)
    resumable: bool = field(init=False)
    """Whether another replica would go on with the very same tokens."""

    def __post_init__(self) -> None:
        bounds = self.ticket.bounds
        num_choices = self.ticket.request.sampling.n if bounds is None else len(bounds.run_ids)
        self.counts = [0] * num_choices
        self.finishes = [None] * num_choices
        is_query = self.ticket.bounds is None and num_choices == 1
        self.resumable = is_query and self.ticket.request.sampling.reproducible

    @property
    def num_tokens(self) -> int:
        """Tokens received, over all choices and attempts."""
        return sum(self.counts)

    @property
    def delivered(self) -> bool:
        """Whether anything has arrived that is charged."""
        return bool(self.num_tokens or self.scored or self.embedded or self.has_saves)

    @property
    def paid_site(self) -> str | None:
        """The site that is paid: the last that delivered, else the last that was asked."""
        if self.served_site is not None or self.placement is None:
            return self.served_site
        return self.placement.site

    @property
    def complete(self) -> bool:
        """Whether every choice has had its last token, or none was asked for, or the embedding
        is there, and so is all that a program saves."""
        if self.ticket.request.mode == "embed":
            return self.embedded
        if (bounds := self.ticket.bounds) is not None:
            ended = zip(bounds.max_tokens, self.finishes, strict=True)
            return bounds.saving <= self.saved and all(not most or done for most, done in ended)
        return not self.ticket.max_output_tokens or None not in self.finishes

    def accept(self, prompt_tokens: int) -> None:
        """Note the length of the prompt, which every attempt finds the same."""
        if not self.prompt_tokens:
            self.prompt_tokens = min(prompt_tokens, self.ticket.prompt_tokens_bound)

    def hear(self, said: Token | Saves | Embedding, now: float) -> str | None:
        """Take what an attempt delivers, or return why the instance may not send it."""
        match said:
            case Token():
                return self._take(said, now)
            case Saves():
                return self._take_saves(said, now)
            case Embedding():
                return self._take_embedding(now)

    def _take(self, token: Token, now: float) -> str | None:
        """Count a token, or return why the instance may not send it."""
        choice = token.choice
        if not 0 <= choice < len(self.counts):
            return f"a token of choice {choice} where {len(self.counts)} were asked for"
        if token.position != self.counts[choice]:
            return f"a token at position {token.position} where {self.counts[choice]} is next"
        if self.finishes[choice] is not None:
            return "a token after the last"
        bounds, most = self.ticket.bounds, self.ticket.max_output_tokens
        if bounds is not None:
            most = bounds.max_tokens[choice]
        if token.position >= most:
            return f"more tokens than the {most} that were asked for"
        self.counts[choice] += 1
        self.finishes[choice] = token.finish_reason
        if self.resumable:
            self.token_ids.append(token.token_id)
        if self.attempt_first_at is None:
            self._serve()
            self.attempt_first_at = now
            self.silent_until, self.hedge_at = None, math.inf
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        return None

    def take_scores(self) -> bool:
        """Return whether the prompt's scores are new to the client."""
        self.silent_until, self.hedge_at = None, math.inf
        if self.scored:
            return False
        self.scored = True
        self._serve()
        return True

    def _take_embedding(self, now: float) -> str | None:
        """Note that the embedding is there, or return why the instance may not send it."""
        if self.ticket.request.mode != "embed":
            return "an embedding where none was asked for"
        if self.embedded:
            return "a second embedding"
        self.embedded = True
        self.attempt_first_at, self.silent_until = now, None
        self._serve()
        return None

    def _take_saves(self, saves: Saves, now: float) -> str | None:
        """Note what a run of a program saved, or return why the instance may not send it."""
        if (bounds := self.ticket.bounds) is None:
            return "saves where no program was asked for"
        if saves.run not in bounds.run_ids:
            return f"saves of the run {saves.run!r}, which the program does not have"
        if saves.run in self.saved:
            return f"saves of the run {saves.run!r} after its last"
        if (saves.data is None) == (saves.handle is None) or not _has_size(saves):
            return "saves that are not what they say"
        size = saves.size if saves.names else 0  # the frame of an empty file is nobody's
        if self.saved_bytes + size > bounds.hook_bytes_out:
            return f"more bytes than the {bounds.hook_bytes_out} that the program may save"
        self.saved_bytes += size
        self.has_saves = True
        if saves.step is None:
            self.saved.add(saves.run)
        self.attempt_first_at, self.silent_until = self.attempt_first_at or now, None
        self._serve()
        return None

    def _serve(self) -> None:
        if self.placement is not None:
            self.served_site = self.placement.site

    def usage(self, reported: Usage | None, now: float) -> Usage:
        """Return what is charged: what arrived here, whatever a site may claim.

        Args:
            reported: What the last attempt says it consumed, if it said so. It can lower the count
                of tokens and never raise it; a prompt counts once, however many attempts read it.
                Nor has it taken longer than the attempt is old.
            now: Seconds of the hub's clock.
        """
        prompt = self.prompt_tokens
        if reported is None:
            return Usage(
                prompt_tokens=prompt if self.delivered else 0,
                output_tokens=self.num_tokens,
                hook_bytes_in=self._hook_bytes_in if self.delivered else 0,
                hook_bytes_out=self.saved_bytes,
            )
        prompt, age_s = min(prompt, reported.prompt_tokens), now - self.sent_at
        return Usage(
            prompt_tokens=prompt,
            cached_prompt_tokens=min(prompt, reported.cached_prompt_tokens),
            output_tokens=min(self.num_tokens, self.num_before + reported.output_tokens),
            hook_bytes_in=min(self._hook_bytes_in, reported.hook_bytes_in),
            hook_bytes_out=min(self.saved_bytes, reported.hook_bytes_out),
            queue_s=min(reported.queue_s, age_s),
            device_s=min(reported.device_s, age_s),
            kv_block_s=min(self.ticket.kv_block_s_bound, reported.kv_block_s),
            adapter_s=min(self.ticket.adapter_s_bound, age_s, reported.adapter_s),
        )

    @property
    def _hook_bytes_in(self) -> int:
        return 0 if self.ticket.bounds is None else self.ticket.bounds.hook_bytes_in

    def charge_usu(self, usage: Usage) -> int:
        """Return the charge at the prices of the site that served, never more than is held."""
        if (site := self.paid_site) is None:
            return 0
        bounds = self.ticket.bounds
        device_s = 0.0 if bounds is None else min(bounds.device_s, usage.device_s)
        rate, tier, factors = self.ticket.rates[site], self.ticket.request.tier, self.ticket.factors
        return min(self.held_usu, charge_usu(rate, tier, usage, device_s=device_s, factors=factors))

    def decode_tokens_per_s(self) -> float:
        """Return the rate of one row of this attempt, or 0 if it was too short to say."""
        num_steps = max(self.counts) - self.num_before // len(self.counts) - 1
        seconds = self.last_token_at - (self.attempt_first_at or self.last_token_at)
        return num_steps / seconds if num_steps > 0 and seconds > 0 else 0.0

    def first_token_s(self) -> float:
        """Return the seconds to this attempt's first token, or 0 if they say nothing of the
        replica: data was on its way, or it was being started."""
        if self.attempt_first_at is None or self.predicted is None or self.predicted.cold_p:
            return 0.0
        request = self.ticket.request
        moved = request.data_bytes > 0 and request.data_site not in (None, self.predicted.site)
        return 0.0 if moved else self.attempt_first_at - self.sent_at

    def transfer(self) -> tuple[str, str, int, float] | None:
        """Return what this attempt moved: from, to, bytes and seconds, those to the first token
        beyond what was predicted without it; ``None`` if it moved nothing."""
        request, predicted = self.ticket.request, self.predicted
        if predicted is None or predicted.cold_p or self.attempt_first_at is None:
            return None
        if request.data_site in (None, predicted.site) or not request.data_bytes:
            return None
        times = times_s(request, predicted)
        own_s = times.wait_s + times.first_s * (1.0 + times.share)
        seconds = self.attempt_first_at - self.sent_at - own_s
        return str(request.data_site), predicted.site, request.data_bytes, seconds

    def observed_over_predicted(self, now: float) -> float:
        """Return how this attempt's seconds compare with what was predicted for as many tokens
        without correction, or 0 if nothing can be said."""
        if self.predicted is None or not self.first_token_s() or len(self.counts) > 1:
            return 0.0
        plain = replace(self.predicted, correction=1.0)
        num_tokens = self.num_tokens - self.num_before
        predicted_s = times_s(self.ticket.request, plain, output_tokens=num_tokens).total_s
        return (now - self.sent_at) / predicted_s if predicted_s > 0 else 0.0


def _has_size(saves: Saves) -> bool:
    """Whether inline saves have the bytes they are charged for."""
    if saves.data is None:
        return True
    padding = saves.data.count("=", -2)
    return len(saves.data) % 4 == 0 and len(saves.data) // 4 * 3 - padding == saves.size
