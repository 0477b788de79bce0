"""DeepSpeed's AutoTP divides a model as torch's collectives do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = list(range(40, 90))
# In a process of its own: DeepSpeed changes the accelerator, loggers and warnings of its process.
ASK = """
import json, queue, sys
from fabric.engine.config import EngineConfig
from fabric.engine.source import ModelSource
from fabric.engine.torch_engine import TorchEngine
from fabric.messages import Finished, Request, Sampling, Task, Token, TokensInput
path, prompt = sys.argv[1], json.loads(sys.argv[2])
config = EngineConfig(
    dtype="float32", num_threads=1, cache_bytes=2**24, tensor_parallel=2, partitioner="deepspeed"
)
engine = TorchEngine(ModelSource.parse(path), config, name="tiny")
engine.start()
sampling = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True)
request = Request(model="tiny", input=TokensInput(ids=prompt), sampling=sampling)
events = queue.Queue()
engine.submit(
    Task(id=request.id, attempt=1, request=request, digest=engine.info.digest, deadline_s=100.0),
    events.put,
)
ids = []
while not isinstance(event := events.get(timeout=100), Finished):
    ids += [event.token_id] if isinstance(event, Token) else []
print(json.dumps([ids, engine.info.digest]))
engine.close()
"""


def test_autotp_gives_the_single_processs_tokens_and_digest(tiny, tiny_dir) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tiny_dir), json.dumps(PROMPT)],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    ids, digest = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("[[")))
    assert ids == tiny.greedy(PROMPT, 12, ignore_eos=True).wait().ids()
    assert digest == tiny.engine.info.digest
