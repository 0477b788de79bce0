"""Text in and out of tokens: prompts, an incremental detokenizer, stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from fabric.errors import ContextExceeded, RequestInvalid
from fabric.messages import ChatInput, TextInput, TokensInput

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Texts:
    """A model's tokenizer, as the engine uses it.

    Args:
        tokenizer: The model's.
        vocabulary: Rows of the input embedding; ids at or above are refused.
        context_tokens: The longest row.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, vocabulary: int, context_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._context_tokens = context_tokens
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def prompt_ids(self, prompt: TextInput | ChatInput | TokensInput) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            RequestInvalid: It has no tokens or ids that the model does not know, its text is not
                Unicode, or the chat template is missing or refuses the conversation.
            ContextExceeded: The text is so long that it need not be tokenized to know.
        """
        match prompt:
            case TokensInput(ids=given):
                self.check_ids(given, param="prompt")
                ids = list(given)
            case TextInput(text=text):
                ids = self._encode(text, add_special_tokens=True)
            case ChatInput():
                ids = self._encode(self._render(prompt), add_special_tokens=False)
        if not ids:
            raise RequestInvalid(param="prompt", value="", reason="it has no tokens")
        return ids

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """Refuse ids that the model has no embedding for.

        Raises:
            RequestInvalid: One is negative or too large.
        """
        for token_id in ids:
            if not 0 <= token_id < self._vocabulary:
                raise RequestInvalid(
                    param=param,
                    value=token_id,
                    reason=f"the model's token ids go from 0 to {self._vocabulary - 1}",
                )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are no character become U+FFFD."""
        return self._tokenizer.backend_tokenizer.decode(  # type: ignore[no-any-return]
            list(ids), skip_special_tokens=skip_special_tokens
        )

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where in a prompt's text each of its tokens begins and ends, in characters."""
        return list(self._tokenizer.backend_tokenizer.encode(text).offsets)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token alone, special ones by their name."""
        return self.decode([token_id], skip_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        at_least = -(-len(text) // self._longest_token)
        if at_least > self._context_tokens:
            raise ContextExceeded(
                prompt_tokens=at_least, max_tokens=0, context_tokens=self._context_tokens
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestInvalid(
                param="prompt", value=text[error.start], reason="it is half of a surrogate pair"
            ) from error
        encoding = self._tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=add_special_tokens
        )
        return list(encoding.ids)

    def _render(self, chat: ChatInput) -> str:
        if self._tokenizer.chat_template is None:
            raise RequestInvalid(
                param="messages",
                value="a conversation",
                reason="this model has no chat template; send a plain prompt",
            )
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                [message.model_dump() for message in chat.messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates are programs and fail in any way
            raise RequestInvalid(
                param="messages",
                value=[message.role for message in chat.messages],
                reason=f"the model's chat template refuses the conversation ({error})",
            ) from error


class TextStream:
    """The readable text of one choice, token by token.

    Text is held back while a character is incomplete or while it may become a stop string. What
    comes out joins to the text of all tokens, cut before the first stop string.

    Args:
        texts: The model's tokenizer.
        stops: Stop strings; may be empty.
    """

    def __init__(self, texts: Texts, stops: Sequence[str]) -> None:
        self._texts = texts
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._context = 0
        """Where the window starts that is decoded: spaces depend on the token before."""
        self._read = 0
        """How many ids are already text."""
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return what became readable. ``stopped`` says whether a stop string did."""
        self._ids.append(token_id)
        before = self._texts.decode(self._ids[self._context : self._read])
        window = self._texts.decode(self._ids[self._context :])
        if len(window) <= len(before) or window.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(window[len(before) :])

    def flush(self) -> str:
        """Return what was held back; the choice has ended."""
        before = self._texts.decode(self._ids[self._context : self._read])
        window = self._texts.decode(self._ids[self._context :])
        self._read = len(self._ids)
        text = self._release(window[len(before) :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        pending = self._held + text
        cuts = [at for at in (pending.find(stop) for stop in self._stops) if at >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return pending[: min(cuts)]
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        released, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` begin ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
