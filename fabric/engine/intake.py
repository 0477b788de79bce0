"""Makes a task ready to run: tokens, limits, rows; or says why it cannot run."""

from __future__ import annotations

from collections.abc import Callable

from fabric.engine.blocks import PrefixKey
from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.constraints import Grammars
from fabric.engine.interface import EventSink
from fabric.engine.lowrank import Delta
from fabric.engine.pooling import check_dimensions
from fabric.engine.rows import ActiveTask, Row
from fabric.engine.sampling import fresh_seed
from fabric.engine.text import Texts
from fabric.errors import CacheExhausted, ContextExceeded, DigestMismatch, RequestInvalid
from fabric.messages import Limits, ProgramInput, Task, Usage


class Intake:
    """What tasks are checked against.

    Args:
        texts: The model's tokenizer.
        grammars: Compiles what answers must be.
        eos_ids: Tokens that end a row, unless its request ignores them.
        digest: Of the model's tensors.
        limits: Of the instance.
        dimensions: Of the model's embeddings.
        deltas_of: Returns what a task changes in the model's layers.
    """

    def __init__(
        self,
        texts: Texts,
        grammars: Grammars,
        *,
        eos_ids: frozenset[int],
        digest: str,
        limits: Limits,
        dimensions: int,
        deltas_of: Callable[[Task], tuple[Delta, ...]],
    ) -> None:
        self._texts = texts
        self._grammars = grammars
        self._eos_ids = eos_ids
        self._digest = digest
        self._limits = limits
        self._dimensions = dimensions
        self._deltas_of = deltas_of
        self.prefix_key = PrefixKey()
        """Of all prefixes of the engine."""

    def activate(self, task: Task, sink: EventSink, *, received_at: float) -> ActiveTask:
        """Return the task with a row for each choice, nothing of it run.

        Rows are where the task's prefix left them; they may have ended already.

        Raises:
            DigestMismatch: It is for another version of the model.
            RequestInvalid: A parameter cannot be used.
            ConstraintInvalid: What its answer must be cannot be read, met or afforded.
            ContextExceeded: Prompt and output are longer than the context.
            CacheExhausted: It would not even fit an empty cache.
        """
        request, wanted = task.request, task.request.sampling
        if task.digest != self._digest:
            raise DigestMismatch(name=request.model, expected=task.digest, actual=self._digest)
        assert not isinstance(request.input, ProgramInput), "programs have an intake of their own"
        check_dimensions(request, self._dimensions)
        if wanted.n > self._limits.max_rows:
            raise RequestInvalid(
                param="n",
                value=wanted.n,
                reason=f"this instance runs at most {self._limits.max_rows} rows at once",
            )
        if task.prefix and (wanted.n > 1 or not wanted.reproducible):
            raise RequestInvalid(
                param="prefix",
                value=f"{len(task.prefix)} tokens",
                reason="only a single choice that is greedy or seeded can be resumed",
            )
        self._texts.check_ids(task.prefix, param="prefix")
        self._texts.check_ids(list(wanted.logit_bias), param="logit_bias")
        prompt = self._texts.prompt_ids(request.input)
        active = ActiveTask(
            task=task,
            sink=sink,
            prompt=prompt,
            max_tokens=self._max_tokens(len(prompt), wanted.max_tokens, wanted.n),
            end_ids=frozenset() if wanted.ignore_eos else self._eos_ids,
            seed=fresh_seed() if wanted.seed is None else wanted.seed,
            received_at=received_at,
            # Without a salt a task shares its prefixes with nobody but itself.
            prefix_start=self.prefix_key.start(
                task.cache_salt or f"{task.id}#{task.attempt}", variant=task.adapter or ""
            ),
            deltas=self._deltas_of(task),
            forked=wanted.n == 1,
            usage=Usage(prompt_tokens=len(prompt)),
        )
        if (needed := active.blocks_needed * BLOCK_TOKENS) > self._limits.cache_tokens:
            raise CacheExhausted(needed_tokens=needed, cache_tokens=self._limits.cache_tokens)
        constraint = wanted.constraint
        active.rows = [
            Row(
                active=active,
                choice=choice,
                tokens=list(prompt),
                stream=self._texts.stream(
                    request.input, stops=wanted.stop, seed=f"{task.id}/{choice}"
                ),
                matcher=None if constraint is None else self._grammars.start(constraint),
            )
            for choice in range(wanted.n)
        ]
        for token_id in task.prefix:
            if not active.finished:
                active.rows[0].append(token_id)
                active.rows[0].stream.take_calls()  # the caller has them
        if active.max_tokens == 0 and not active.reads_all:
            active.end_empty()
        return active

    def _max_tokens(self, num_prompt: int, asked: int | None, num_choices: int) -> int:
        room = self._limits.context_tokens - num_prompt
        least = 1 if asked is None else asked
        if least > room:
            raise ContextExceeded(
                prompt_tokens=num_prompt,
                max_tokens=least,
                context_tokens=self._limits.context_tokens,
            )
        if asked is not None:
            return asked
        # Without a limit of its own a task takes what the context and an empty cache allow.
        shared = num_prompt // BLOCK_TOKENS
        own = (self._limits.cache_tokens // BLOCK_TOKENS - shared) // num_choices
        return max(1, min(room, (shared + own) * BLOCK_TOKENS - num_prompt))
