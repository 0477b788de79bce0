"""What recipes share: sessions that come with a result, answers as token ids, words for ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Unpack

from fabric.errors import RequestInvalid
from fabric.messages.program import ProgramLimits
from fabric.sdk.arrays import Array
from fabric.sdk.programs import OnEvent, ProgramOptions
from fabric.sdk.tracing.backend import Backend, LocalEngine
from fabric.sdk.tracing.run import Prompt
from fabric.sdk.tracing.session import Session, Target

Answer = str | int
"""A token: its id, or a text that is one token."""


class Options(ProgramOptions, total=False):
    """What every recipe takes besides its own arguments.

    Attributes:
        backend: What runs it; a client with the settings' hub by default.
        limits: What the program may take.
        on_event: Is told of tokens and of streamed saves.
    """

    backend: Backend | LocalEngine | None
    limits: ProgramLimits | None
    on_event: OnEvent | None


@contextmanager
def asking(target: Target, **options: Unpack[Options]) -> Iterator[Session]:
    """Open a session; it is run when the block is over, or by ``execute`` inside."""
    with Session(target, **options) as session:
        yield session


def layers_of(session: Session, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers that are meant; all of them by default."""
    num_layers = session.manifest.num_layers
    if layers is None:
        return tuple(range(num_layers))
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise RequestInvalid(
                param="layers", value=layer, reason=f"the model has {num_layers} layers"
            )
    return tuple(layer % num_layers for layer in layers)


def token_id(session: Session, answer: Answer, param: str = "answer") -> int:
    """Return the id of an answer.

    Raises:
        RequestInvalid: Its text is not one token.
    """
    if not isinstance(answer, str):
        return int(answer)
    found = session.tokens(answer)
    if found and found[0].text not in answer:
        found = found[1:]  # some vocabularies begin every text with a token of their own
    if len(found) != 1:
        parts = [token.text for token in found]
        raise RequestInvalid(
            param=param,
            value=answer,
            reason=f"it is the tokens {parts}; give one token, often with a space before it",
        )
    return int(found[0].id)


def texts_of(session: Session, ids: Array) -> dict[int, str]:
    """Return what token ids read as."""
    unique = sorted({int(id) for id in ids.ravel()})
    room = session.manifest.context_tokens
    texts: dict[int, str] = {}
    for begin in range(0, len(unique), room):
        some = unique[begin : begin + room]
        texts |= {id: token.text for id, token in zip(some, session.tokens(some), strict=True)}
    return texts


def labels_of(session: Session, prompt: Prompt) -> tuple[str, ...]:
    """Return the texts of a prompt's tokens."""
    return tuple(token.text for token in session.tokens(prompt))


def positions_of(tokens: Sequence[str], text: str, param: str = "subject") -> tuple[int, ...]:
    """Return the positions of the tokens that cover a text, at its first place.

    Raises:
        RequestInvalid: The prompt does not have it.
    """
    begin = "".join(tokens).find(text)
    if begin < 0 or not text:
        raise RequestInvalid(param=param, value=text, reason="the prompt does not have this text")
    ends, at = list[tuple[int, int]](), 0
    for token in tokens:
        ends.append((at, at := at + len(token)))
    end = begin + len(text)
    return tuple(p for p, (first, last) in enumerate(ends) if first < end and last > begin)


def same_length(session: Session, clean: Prompt, corrupt: Prompt, labels: Sequence[str]) -> None:
    """Hold two prompts to the same number of tokens; ``labels`` are the corrupt one's.

    Raises:
        RequestInvalid: They have not.
    """
    num_tokens = len(labels_of(session, clean))
    if num_tokens != len(labels):
        raise RequestInvalid(
            param="corrupt",
            value=corrupt if isinstance(corrupt, str) else list(corrupt),
            reason=f"it has {len(labels)} tokens and the clean prompt {num_tokens}; values are"
            " taken over position by position, so make them equally long",
        )


def point_at(point: str, layer: int) -> str:
    """Return the point of a layer: ``layers.{i}.out`` with its number."""
    return point.replace("{i}", str(layer))
