"""Answers are what their requests say they must be, whatever the model would rather write."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fabric.engine.constraints import Grammars
from fabric.errors import ConstraintInvalid
from fabric.messages import Choices, Regex

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SAMPLED = {"temperature": 1.0, "seed": 3}
MANY = {"anyOf": [{"properties": {f"p{i}": {"type": "string"}}} for i in range(6)]}
GREEDY = {"temperature": 0.0}


def schema(definition: object) -> dict[str, object]:
    return {"kind": "json_schema", "definition": json.dumps(definition)}


def regex(pattern: str) -> dict[str, object]:
    return {"kind": "regex", "pattern": pattern}


def choices(*texts: str) -> dict[str, object]:
    return {"kind": "choices", "texts": texts}


@pytest.mark.parametrize("how", [GREEDY, *({**SAMPLED, "seed": seed} for seed in range(6))])
def test_json_follows_its_schema_and_ends_where_it_is_whole(tiny, how):
    heard = tiny.ask("A person:", constraint=schema(PERSON), max_tokens=200, **how)
    assert heard.finished.finish_reasons == ("stop",)
    jsonschema.validate(json.loads(heard.text()), PERSON)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, SAMPLED | {"top_p": 0.5}, SAMPLED | {"top_k": 1}])
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (regex(r"[A-F]{3}-[0-9]{2,4}(x|é🎉)"), r"[A-F]{3}-[0-9]{2,4}(x|é🎉)"),
        (choices("yes", "no", "naïve 🎉"), "yes|no|naïve 🎉"),
        (choices("only"), "only"),
        (choices('say "a\\b"\n'), re.escape('say "a\\b"\n')),
    ],
)
def test_text_matches_its_expression_or_is_a_choice(tiny, how, constraint, pattern):
    heard = tiny.ask("Answer:", constraint=constraint, max_tokens=60, **how)
    assert heard.finished.finish_reasons == ("stop",)
    assert re.fullmatch(pattern, heard.text())


def test_the_end_comes_only_where_the_expression_allows_it(tiny):
    end = {"256": 100.0}
    short = tiny.ask("a", constraint=regex("[ab]{4,}"), logit_bias=end, max_tokens=60, **GREEDY)
    assert short.finished.finish_reasons == ("stop",)
    assert re.fullmatch("[ab]{4}", short.text())
    assert short.ids()[-1] == 256
    open_ended = tiny.ask("a", constraint=regex("[ab]{90}"), logit_bias=end, max_tokens=9, **GREEDY)
    assert open_ended.finished.finish_reasons == ("length",)
    assert re.fullmatch("[ab]{9}", open_ended.text())


def test_free_rows_are_the_same_beside_constrained_ones(tiny):
    free = {"max_tokens": 24, "logprobs": 3, "ignore_eos": True}
    alone = [tiny.ask("free text", **free, **how).wait() for how in (GREEDY, SAMPLED)]
    crowd = [
        tiny.ask(f"{i}", constraint=regex("[a-z]{40}"), max_tokens=40, **SAMPLED) for i in range(4)
    ]
    mixed = [tiny.ask("free text", **free, **how).wait() for how in (GREEDY, SAMPLED)]
    for heard, before in zip(mixed, alone, strict=True):
        assert heard.ids() == before.ids()
        assert [t.logprob for t in heard.tokens()] == pytest.approx(
            [t.logprob for t in before.tokens()], abs=1e-4
        )
    assert all(re.fullmatch("[a-z]{40}", heard.wait().text()) for heard in crowd)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED])
@pytest.mark.parametrize("cut", [1, 5, 17])
def test_an_answer_goes_on_where_another_attempt_left_it(tiny, how, cut):
    asked = {"constraint": schema(PERSON), "max_tokens": 120, **how}
    whole = tiny.ask("Someone:", **asked).wait()
    rest = tiny.ask("Someone:", prefix=tuple(whole.ids()[:cut]), **asked).wait()
    assert [*whole.ids()[:cut], *rest.ids()] == whole.ids()
    assert rest.finished.finish_reasons == ("stop",)


def test_a_prefix_that_breaks_the_constraint_is_refused(tiny):
    heard = tiny.ask("x", constraint=choices("yes", "no"), prefix=(ord("Q") - 33,), **GREEDY)
    assert heard.failed.failure.code == "constraint_failed"


def test_rows_that_are_computed_again_keep_their_place_in_the_grammar(tiny_dir, drive):
    small = drive(tiny_dir, cache_bytes=2**17)
    asked = {"constraint": regex(r"([a-f]{9} ){10}"), "max_tokens": 110, **SAMPLED}
    alone = small.ask("prompt", **asked).wait()
    before = small.engine.load().num_preempted
    crowd = [small.ask("prompt", **asked) for _ in range(4)]
    texts = [heard.wait().text() for heard in crowd]
    assert small.engine.load().num_preempted > before
    assert texts == [alone.text()] * 4
    assert re.fullmatch(r"([a-f]{9} ){10}", alone.text())


def test_every_choice_walks_the_grammar_by_itself(tiny):
    heard = tiny.ask("n", constraint=regex("[a-z]{3,9}!"), n=4, max_tokens=20, **SAMPLED)
    assert heard.finished.finish_reasons == ("stop",) * 4
    texts = [heard.text(choice) for choice in range(4)]
    assert len(set(texts)) > 1
    assert all(re.fullmatch("[a-z]{3,9}!", text) for text in texts)


def test_a_stop_string_ends_a_constrained_answer_too(tiny):
    heard = tiny.ask("s", constraint=regex("[a-z]{3}#[a-z]{9}"), stop=["#"], **SAMPLED)
    assert heard.finished.finish_reasons == ("stop",)
    assert re.fullmatch("[a-z]{3}", heard.text())


def test_logprobs_are_those_of_the_model_before_the_grammar(tiny):
    free = tiny.ask("abc", logprobs=20, max_tokens=1, **GREEDY).wait().tokens()[0]
    bound = tiny.ask("abc", constraint=choices("Z!"), logprobs=20, max_tokens=1, **GREEDY)
    token = bound.wait().tokens()[0]
    assert token.token_text == "Z"
    assert [t.token_id for t in token.top_logprobs] == [t.token_id for t in free.top_logprobs]
    assert token.logprob < token.top_logprobs[0].logprob


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"kind": "json_schema", "definition": '{"type":'}, "line 1 column"),
        (schema({"type": "nonsense"}), "nonsense"),
        (schema(False), "object schema"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "greater than"),
        (schema({"$ref": "#/nowhere"}), "nowhere"),
        (schema({"$ref": "https://example.com/schema.json"}), "does not fetch"),
        (schema({"not": {"type": "string"}}), "not"),
        (regex("[a-"), "unclosed"),
        (regex(r"(?=a)b"), "look-around"),
        (regex(r"[^\s\S]"), "NoExtension"),
        (schema({"allOf": [MANY] * 6}), "too large"),
    ],
)
def test_what_cannot_be_met_is_refused_alone(tiny, constraint, said):
    neighbour = tiny.ask("neighbour", max_tokens=20, ignore_eos=True)
    failure = tiny.ask("x", constraint=constraint, max_tokens=20, **GREEDY).failed.failure
    assert failure.code == "invalid_constraint"
    assert said in failure.message
    assert len(failure.message) < 500
    assert neighbour.finished.finish_reasons == ("length",)


def test_an_expression_that_explodes_ends_alone(tiny):
    neighbour = tiny.ask("neighbour", max_tokens=20, ignore_eos=True)
    explosive = tiny.ask("x", constraint=regex("(a{1000}){1000}"), max_tokens=20, **GREEDY)
    assert explosive.failed.failure.code in {"invalid_constraint", "constraint_failed"}
    assert neighbour.finished.finish_reasons == ("length",)


def test_a_grammar_that_grows_too_complex_on_the_way_ends_alone(tiny):
    wide = schema({"type": "object", "properties": {f"p{i}": {} for i in range(2500)}})
    neighbour = tiny.ask("neighbour", max_tokens=20, ignore_eos=True)
    failure = tiny.ask("x", constraint=wide, max_tokens=20, **SAMPLED).failed.failure
    assert failure.code == "constraint_failed"
    assert neighbour.finished.finish_reasons == ("length",)


def test_a_model_without_an_end_has_no_constrained_answers(byte_tokens):
    endless = Grammars(byte_tokens, vocabulary=259, eos_ids=())
    with pytest.raises(ConstraintInvalid, match="no end-of-sequence token"):
        endless.start(Choices(texts=("a",)))


@pytest.mark.parametrize("kind", ["bytes", "read from GGUF", "pieces"])
def test_tokenizers_of_all_kinds_write_spaces_and_other_scripts(byte_tokens, kind):
    backend = Tokenizer.from_str(byte_tokens.backend_tokenizer.to_str())
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "read from GGUF":
        backend.decoder = decoders.Sequence([*pieces, decoders.ByteLevel()])
    if kind == "pieces":
        names = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abé1"]
        vocabulary = {name: i for i, name in enumerate(names)}
        backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(pieces)
        backend.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    size = len(tokenizer)
    grammars = Grammars(tokenizer, vocabulary=size, eos_ids=[size - 1 if kind != "pieces" else 1])
    matcher, ids = grammars.start(Regex(pattern="( é|🎉 1){3}")), []
    while not matcher.done:
        ids.append(int(matcher.allowed(size).nonzero()[0][-1]))
        matcher.advance(ids[-1])
    assert re.fullmatch("( é|🎉 1){3}", backend.decode(ids))
