"""Which tokens may come next, by what a request says its answer must be.

A grammar is compiled once; each row walks its own copy of it. llguidance bounds what a grammar may
take by fuel, but not everything: what takes too long all the same ends its own request.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from fabric.errors import ConstraintFailed, ConstraintInvalid
from fabric.messages import Constraint, JsonSchema, Regex

_NUM_KEPT = 32
"""Compiled grammars that are kept for the next request."""

_LONGEST_S = 0.5
"""Processor time of one mask: the whole batch waits for it."""

_WHITESPACE = r"[ \n\t]{0,32}"
"""Between the parts of JSON. Without a bound, a small model may write nothing else for ever."""


_SAMPLE = 'A sample: {"naïve 🎉": [1, -2.5e3]}\n\tend'
"""Text by which a tokenizer is checked."""


class Matcher:
    """How far one row has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> Matcher:
        """Return another one at the same place."""
        return Matcher(self._matcher.deep_copy())

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """Say of each token whether it may come next; end-of-sequence only after a whole answer.

        Raises:
            ConstraintFailed: The grammar has grown too complex here, or allows nothing.
        """
        started = time.thread_time()
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        took_s = time.thread_time() - started
        if self._matcher.is_error():
            raise ConstraintFailed(reason=_reason(self._matcher))
        if took_s > _LONGEST_S:
            raise ConstraintFailed(reason=f"one token of it took {took_s:.1f} s to prepare")
        bits = np.unpackbits(packed, count=vocabulary, bitorder="little")
        return bits.view(np.bool_)

    def after(self, token_id: int) -> Matcher | None:
        """Return another one, a token further; ``None`` if it may not come or nothing follows."""
        other = self.copy()
        if not other._matcher.consume_token(token_id) or other._matcher.is_stopped():
            return None
        return other

    def advance(self, token_id: int) -> None:
        """Take the row's next token.

        Raises:
            ConstraintFailed: The grammar does not allow it.
        """
        if not self._matcher.consume_token(token_id):
            raise ConstraintFailed(reason=f"it does not allow the token {token_id} here")


class Grammars:
    """Compiles constraints for one model.

    Args:
        tokenizer: The model's.
        vocabulary: Rows of the input embedding.
        eos_ids: Tokens that end a row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        vocabulary: int,
        eos_ids: Collection[int],
    ) -> None:
        self._given = tokenizer
        self._eos_ids = sorted(eos_ids)
        self._reading = threading.Lock()
        self._compiled: OrderedDict[Constraint, Matcher] = OrderedDict()
        self._limits = LLParserLimits(
            max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False
        )
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._why_not = "" if eos_ids else "the model has no end-of-sequence token"

    def read_tokenizer(self) -> None:
        """Read the tokenizer, once; a second or two, which need not be a request's."""
        with self._reading:
            if self._tokenizer is None and not self._why_not:
                try:
                    self._tokenizer = _read(self._given, self._vocabulary, self._eos_ids)
                except Exception as error:  # the model can be served all the same
                    self._why_not = f"the model's tokenizer is not of a known kind ({error})"

    def start(self, constraint: Constraint) -> Matcher:
        """Return a matcher at the beginning of an answer.

        Raises:
            ConstraintInvalid: It cannot be read, nothing satisfies it, or it is too complex.
        """
        if constraint not in self._compiled:
            self._compiled[constraint] = self._compile(constraint)
            if len(self._compiled) > _NUM_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return self._compiled[constraint].copy()

    def _compile(self, constraint: Constraint) -> Matcher:
        self.read_tokenizer()
        if self._tokenizer is None:
            raise ConstraintInvalid(kind=constraint.kind, reason=self._why_not)
        try:
            grammar = _grammar(constraint)
        except ValueError as error:
            raise ConstraintInvalid(kind=constraint.kind, reason=str(error)) from error
        raw = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if raw.is_error():
            raise ConstraintInvalid(kind=constraint.kind, reason=_reason(raw))
        matcher = Matcher(raw)
        try:
            matcher.allowed(self._vocabulary)
        except ConstraintFailed as error:
            reason = str(error.detail["reason"])
            raise ConstraintInvalid(kind=constraint.kind, reason=reason) from error
        return matcher


def _read(tokenizer: PreTrainedTokenizerFast, vocabulary: int, eos_ids: list[int]) -> LLTokenizer:
    """Return the tokenizer as llguidance knows it.

    Raises:
        ValueError: They do not agree on the bytes of tokens.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["padding"] = described["truncation"] = None
    if "ByteLevel" in json.dumps(described["pre_tokenizer"]):
        # Read from GGUF, it also names decoders of other families; llguidance goes by the first.
        described["decoder"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": True,
        }
    known = LLTokenizer(
        json.dumps(described), n_vocab=max(vocabulary, len(tokenizer)), eos_token=eos_ids
    )
    # The backend's own encode changes nothing in it, so other threads may use it meanwhile.
    ids = tokenizer.backend_tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
    if known.decode_bytes(ids).decode(errors="replace").lstrip() != _SAMPLE:
        raise ValueError("the bytes of its tokens cannot be told")
    return known


def _grammar(constraint: Constraint) -> str:
    match constraint:
        case JsonSchema(definition=definition):
            return LLMatcher.grammar_from_json_schema(
                definition, overrides={"whitespace_pattern": _WHITESPACE}
            )
        case Regex(pattern=pattern):
            return grammar_from("regex", pattern)
        case _:
            return grammar_from("choice", json.dumps(constraint.texts))


def _reason(matcher: LLMatcher) -> str:
    """Return llguidance's finding in one line."""
    text, *_ = matcher.get_error().partition("<backtrace>")
    return " ".join(text.removesuffix("<non-verbose/>").split())[:300]
