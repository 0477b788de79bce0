"""The events of a task, made from what the engine knows of it."""

from __future__ import annotations

from fabric.engine.pooling import pack_normalised
from fabric.engine.rows import ActiveTask, Row
from fabric.engine.sampling import Score
from fabric.engine.text import Texts
from fabric.errors import FabricError
from fabric.messages import (
    Accepted,
    Embedding,
    Failed,
    Failure,
    Finished,
    PromptScored,
    ScoredToken,
    Task,
    Token,
    TopLogprob,
    Usage,
)


class Reports:
    """Makes events; the tokenizer gives them the text of single tokens."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    @staticmethod
    def accepted(active: ActiveTask) -> Accepted:
        """Return the first event of a task that can run."""
        task = active.task
        return Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=len(active.prompt))

    @staticmethod
    def accepted_program(task: Task, num_prompt_tokens: int) -> Accepted:
        """Return the first event of a program whose runs have so many tokens of prompts."""
        return Accepted(task_id=task.id, attempt=task.attempt, prompt_tokens=num_prompt_tokens)

    def prompt_scored(self, active: ActiveTask) -> PromptScored:
        """Return the prompt's tokens with their scores."""
        tokens = tuple(
            ScoredToken(
                token_id=token_id,
                text=self._texts.token_text(token_id),
                logprob=None if score is None else score.logprob,
                top_logprobs=self._top(score),
            )
            for token_id, score in zip(active.prompt, active.scores, strict=True)
        )
        task = active.task
        return PromptScored(task_id=task.id, attempt=task.attempt, tokens=tokens)

    @staticmethod
    def embedding(active: ActiveTask) -> Embedding:
        """Return the vector of a prompt that has run: its direction is the mean's, or the last's.

        Raises:
            RowFailed: It is not finite.
        """
        assert active.hidden_H is not None
        task = active.task
        data = pack_normalised(active.hidden_H)
        return Embedding(task_id=task.id, attempt=task.attempt, data=data)

    def token(self, row: Row, text: str, score: Score | None) -> Token:
        """Return the event of the row's last token, which made ``text`` readable."""
        task, token_id = row.active.task, row.tokens[-1]
        return Token(
            task_id=task.id,
            attempt=task.attempt,
            choice=row.choice,
            position=row.position - 1,
            token_id=token_id,
            text=text,
            token_text=self._texts.token_text(token_id),
            tool_calls=row.stream.take_calls(),
            logprob=None if score is None else score.logprob,
            top_logprobs=self._top(score),
            finish_reason=row.finish_reason,
        )

    @staticmethod
    def finished(active: ActiveTask) -> Finished:
        """Return the last event of a task whose choices have all ended."""
        task = active.task
        reasons = tuple(row.finish_reason for row in active.rows if row.finish_reason)
        return Finished(
            task_id=task.id, attempt=task.attempt, finish_reasons=reasons, usage=active.usage
        )

    @staticmethod
    def failed(task: Task, error: FabricError, usage: Usage = Usage()) -> Failed:  # noqa: B008
        """Return the last event of a task that ended by an error."""
        return Failed(task_id=task.id, attempt=task.attempt, failure=Failure.of(error), usage=usage)

    def _top(self, score: Score | None) -> tuple[TopLogprob, ...]:
        return tuple(
            TopLogprob(token_id=token_id, text=self._texts.token_text(token_id), logprob=logprob)
            for token_id, logprob in (score.top if score else ())
        )
