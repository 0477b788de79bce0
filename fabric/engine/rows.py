"""A task inside the engine: its choices as rows, and what it has used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from fabric.engine.blocks import next_name
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.constraints import Matcher
from fabric.engine.interface import EventSink
from fabric.engine.lowrank import Delta
from fabric.engine.sampling import Score
from fabric.engine.text import TextStream
from fabric.messages import Sampling, Task, Usage
from fabric.messages.events import FinishReason

if TYPE_CHECKING:
    from fabric.engine.programs.task import RunProgram

_PATIENCE_S = {"interactive": 0.0, "standard": 10.0, "batch": 120.0}
"""How much later than it came a task of each tier is due."""

FIRST_ACCEPTANCE = 0.6
"""What part of a row's guesses is taken to be right before any has been run."""

_GRAM_TOKENS = 3


class Grams:
    """Where each run of three tokens of a row was last followed by another token."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}
        self._num_read = _GRAM_TOKENS

    def find(self, tokens: Sequence[int]) -> int | None:
        """Return where what followed the last three tokens begins, if they came before.

        Args:
            tokens: The row's; each time the same ones and perhaps more.
        """
        for end in range(self._num_read, len(tokens)):
            self._followed[tuple(tokens[end - _GRAM_TOKENS : end])] = end
        self._num_read = max(self._num_read, len(tokens))
        return self._followed.get(tuple(tokens[-_GRAM_TOKENS:]))


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One choice of a task: its tokens, and how many of them have keys in the cache."""

    active: ActiveTask
    choice: int
    tokens: list[int]
    stream: TextStream
    matcher: Matcher | None = None
    """What its tokens must be; it stays where it is when the row is computed again."""
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
    names: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were asked for."""
    num_sound: int = 0
    """Cached tokens that finite logits have shown to be sound."""
    num_named: int = 0
    """Blocks at the start of its table that others can find."""
    finish_reason: FinishReason | None = None
    acceptance: float = FIRST_ACCEPTANCE
    """What part of the tokens guessed for it were right, the last ones counting most."""
    grams: Grams = field(default_factory=Grams)
    num_drafted: int = 0
    """Tokens at its start whose keys a draft model has."""
    spoilt: bool = False
    """Whether a guess has left NaN in its blocks; nothing more is guessed for it."""

    @property
    def num_remaining(self) -> int:
        """Tokens still to run before the next one can be chosen."""
        return len(self.tokens) - self.num_cached

    @property
    def decodes(self) -> bool:
        """Whether its prompt has run and only its newest token is due."""
        return self.num_remaining == 1 and self.num_cached >= len(self.active.prompt)

    @property
    def ended(self) -> bool:
        """Whether it has its last token."""
        return self.finish_reason is not None

    @property
    def position(self) -> int:
        """The position of the next generated token."""
        return len(self.tokens) - len(self.active.prompt)

    @property
    def num_left(self) -> int:
        """The most tokens that it may still generate."""
        return self.active.max_tokens - self.position

    @property
    def num_reusable(self) -> int:
        """Tokens at its start that need not run where others have computed them."""
        most, program = len(self.tokens) - 1, self.active.program
        return most if program is None else min(most, program.execution.first_read)

    def block_names(self, num_blocks: int) -> list[bytes]:
        """Return the names of its first ``num_blocks`` blocks, which its tokens fill."""
        while len(self.names) < num_blocks:
            before = self.names[-1] if self.names else self.active.prefix_start
            begin = len(self.names) * BLOCK_TOKENS
            if self.active.program is not None:
                before = self.active.program.name_before(before, range(begin, begin + BLOCK_TOKENS))
            self.names.append(next_name(before, self.tokens[begin : begin + BLOCK_TOKENS]))
        return self.names[:num_blocks]

    def append(self, token_id: int) -> str:
        """Add a generated token and return what became readable; ``finish_reason`` may be set.

        A token that ends the row has no text of its own; with it comes what was held back. A
        constrained row also ends with the token after which nothing may follow.

        Raises:
            ConstraintFailed: The row's constraint does not allow the token.
        """
        self.tokens.append(token_id)
        ends = token_id in self.active.end_ids
        text = "" if ends else self.stream.push(token_id)
        full = self.position >= self.active.max_tokens
        complete = not ends and self._completes(token_id)
        if (ends or full or complete) and not self.stream.stopped:
            text += self.stream.flush()
        if ends or complete or self.stream.stopped:
            self.finish_reason = "tool_calls" if self.stream.has_calls else "stop"
        elif full:
            self.finish_reason = "length"
        return text

    def _completes(self, token_id: int) -> bool:
        if self.matcher is None:
            return False
        self.matcher.advance(token_id)
        return self.matcher.done


@dataclass(slots=True, kw_only=True, eq=False)
class ActiveTask:
    """A task in the engine. Times are of ``time.monotonic``."""

    task: Task
    sink: EventSink
    prompt: list[int]
    max_tokens: int
    end_ids: frozenset[int]
    """Tokens that end a row."""
    seed: int
    received_at: float
    prefix_start: bytes
    """Where the names of its blocks start; see ``PrefixKey``."""
    deltas: tuple[Delta, ...] = ()
    """What changes the model's layers for its rows."""
    rows: list[Row] = field(default_factory=list)
    fork_blocks: list[int] = field(default_factory=list)
    """Taken for the choices that branch off when the prompt has run."""
    forked: bool = False
    """Whether they have; until then only the first one runs."""
    looked_up: bool = False
    """Whether its prompt was looked for in the cache."""
    scores: list[Score | None] = field(default_factory=list)
    """Of the prompt's tokens, as far as they have run; the first has none."""
    scored: bool = False
    """Whether the scores were delivered."""
    hidden_H: Tensor | None = None
    """Of a prompt to be embedded, as far as it has run: the sum of its hidden states, or the last
    of them; float32."""
    usage: Usage = field(default_factory=Usage)
    deaf: bool = False
    """Whether its sink has raised; nobody is left to run it for."""

    program: RunProgram | None = None
    """What it is a run of, if it is one."""

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return self.task.request.sampling if self.program is None else self.program.sampling

    @property
    def due_at(self) -> float:
        """When it should run: what is due first comes first."""
        task = self.task
        return self.received_at + min(_PATIENCE_S[task.request.tier], task.deadline_s / 2)

    @property
    def rank(self) -> int:
        """The place of its tier, 0 the first."""
        return list(_PATIENCE_S).index(self.task.request.tier)

    @property
    def live_rows(self) -> list[Row]:
        """Choices that run: the first until the prompt is done, then all that have not ended."""
        rows = self.rows if self.forked else self.rows[:1]
        return [row for row in rows if row.finish_reason is None]

    def restart(self) -> None:
        """Forget what was computed of a task that gave its blocks up."""
        self.scores = [] if self.scores_due else self.scores
        self.hidden_H = None
        if self.program is not None:
            self.program.execution.restart()
            self.rows[0].tokens = list(self.prompt)

    @property
    def embeds(self) -> bool:
        """Whether its prompt is to become a vector."""
        return self.task.request.mode == "embed"

    @property
    def reads_all(self) -> bool:
        """Whether every token of its prompt must run, whatever others have computed."""
        return self.embeds or self.scores_due

    @property
    def scores_due(self) -> bool:
        """Whether its prompt is still to be scored; one that resumes has delivered them before."""
        return self.sampling.prompt_logprobs and not self.task.prefix and not self.scored

    @property
    def prompt_done(self) -> bool:
        """Whether the whole prompt has run."""
        return self.rows[0].num_cached >= len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(row.finish_reason for row in self.rows)

    def count_output(self, num_accepted: int) -> None:
        """Count a token; ``num_accepted`` is 1 where the one before it had been guessed."""
        usage = self.usage
        update = {"output_tokens": usage.output_tokens + 1}
        if num_accepted:
            update["accepted_tokens"] = usage.accepted_tokens + num_accepted
        self.usage = usage.model_copy(update=update)

    def end_empty(self) -> None:
        """End every choice without a token."""
        for row in self.rows:
            row.finish_reason = "stop" if self.embeds else "length"

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return sum(row.finish_reason is None for row in self.rows)

    @property
    def blocks_shared(self) -> int:
        """Full blocks of the prompt, which all choices hold together."""
        return len(self.prompt) // BLOCK_TOKENS

    @property
    def num_fork_blocks(self) -> int:
        """Blocks to be copied when the choices branch off."""
        if self.forked or len(self.prompt) % BLOCK_TOKENS == 0:
            return 0
        return self.sampling.n - 1

    @property
    def blocks_own(self) -> int:
        """Blocks that each choice needs for itself."""
        return -(-(len(self.prompt) + self.max_tokens) // BLOCK_TOKENS) - self.blocks_shared

    @property
    def blocks_needed(self) -> int:
        """Blocks of the task at its longest."""
        return self.blocks_shared + self.sampling.n * self.blocks_own
