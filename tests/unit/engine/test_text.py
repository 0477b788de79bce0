"""Text comes out once, whole, and not past a stop string."""

from __future__ import annotations

import itertools

import pytest

from fabric.engine.text import TextStream
from fabric.errors import RequestInvalid
from fabric.messages import ChatInput, ChatMessage, TextInput

TEXTS = ["plain", "naïve café", "🎉🎊 and 日本語 text", "👩‍👩‍👧‍👦", " leading", "a\n\nb"]


@pytest.fixture
def texts(tiny):
    return tiny.texts


def stream_of(texts, text, stops=()):
    """Push a text's tokens; return the pieces until the end, and the stream."""
    stream, pieces = TextStream(texts, stops), []
    for token_id in texts.prompt_ids(TextInput(text=text)):
        pieces.append(stream.push(token_id))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.flush()], stream


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_no_partial_character(texts, text):
    pieces, _ = stream_of(texts, text)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_of_four_bytes_comes_with_its_last_token(texts):
    pieces, _ = stream_of(texts, "🎉!")
    assert pieces == ["", "", "", "🎉", "!", ""]


def test_bytes_that_never_become_a_character_are_flushed(texts):
    ids = texts.prompt_ids(TextInput(text="ok🎉"))[:-1]
    stream = TextStream(texts, ())
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == "ok"
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_broken_bytes_among_characters_join_to_what_the_whole_decodes_to(texts):
    heart, umlaut = (texts.prompt_ids(TextInput(text=text)) for text in ("🎉", "ü"))
    parts = [heart[:2], umlaut, heart[2:], heart, umlaut[:1]]
    for order in itertools.permutations(parts):
        ids = [token_id for part in order for token_id in part]
        stream = TextStream(texts, ())
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join([*pieces, stream.flush()]) == texts.decode(ids)


def test_special_tokens_have_no_text(texts):
    stream = TextStream(texts, ())
    assert [stream.push(token_id) for token_id in (65, 257, 66)] == [
        texts.decode([65]), "", texts.decode([66]),
    ]  # fmt: skip
    assert texts.token_text(257) == "<start>"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("aab",), "a"),
        ("abcabx", ("abx",), "abc"),
        ("stop at once", ("s",), ""),
        ("x🎉y", ("🎉",), "x"),
        ("no such", ("nosuch", "suchlike"), "no such"),
        ("overlap", ("lapse", "er"), "ov"),
        ("a\n\nb", ("\n\n",), "a"),
    ],
)
def test_text_ends_before_the_first_stop_string(texts, text, stops, expected):
    pieces, stream = stream_of(texts, text, stops)
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != text)


def test_what_may_become_a_stop_string_is_held_back(texts):
    pieces, _ = stream_of(texts, "tell ten", ("tent",))
    assert pieces == ["", "", "tel", "l", " ", "", "", "", "ten"]


def test_stop_strings_end_a_task_over_token_borders(tiny):
    whole = tiny.greedy("abc", 40, ignore_eos=True).wait()
    readable = whole.text()
    stop = readable[5:8]
    at = readable.find(stop)
    heard = tiny.greedy("abc", 40, ignore_eos=True, stop=[stop])
    assert heard.finished.finish_reasons == ("stop",)
    assert heard.text() == readable[:at]
    assert len(heard.tokens()) < 40
    for cut in range(1, len(heard.tokens())):
        rest = tiny.greedy(
            "abc", 40, ignore_eos=True, stop=[stop], prefix=tuple(heard.ids()[:cut])
        ).wait()
        before = "".join(token.text for token in heard.tokens()[:cut])
        assert before + rest.text() == heard.text()


def test_a_model_without_a_template_refuses_conversations(texts):
    tokenizer = texts._tokenizer
    tokenizer.chat_template = None
    chat = ChatInput(messages=(ChatMessage(role="user", content="hi"),))
    with pytest.raises(RequestInvalid, match="no chat template"):
        texts.prompt_ids(chat)
