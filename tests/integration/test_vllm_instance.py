"""An instance whose engine is a server of vLLM's protocol, which ends when the instance does."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from fabric.engine.model import load_model
from fabric.engine.source import ModelSource
from fabric.launch.relay import open_session
from fabric.messages import EngineOptions, Request, Sampling, Task, TextInput, VllmOptions
from fabric.testing.processes import wait_ended
from fabric.testing.rig import get_spec, start_instance
from fabric.testing.tiny_model import save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

OPTIONS = EngineOptions(
    backend="vllm",
    dtype="float32",
    num_threads=1,
    cache_bytes=4 * 2**20,
    max_rows=4,
    step_tokens=64,
    vllm=VllmOptions(command=(sys.executable, "-m", "fabric.testing.vllm_server")),
)


def test_it_answers_shows_metrics_and_leaves_no_server_behind(tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "model")
    source = ModelSource.parse(str(path))
    digest = load_model(source, name="m", dtype="float32").digest
    given = get_spec(tmp_path)
    launch = given.launch.model_copy(update={"source": str(path), "digest": digest})
    spec = given.model_copy(update={"launch": launch, "options": OPTIONS})
    with start_instance(spec, "fabric.instance") as instance:
        status = instance.wait_for("ready", "failed", timeout_s=400)
        assert status.state == "ready", status.detail
        started = psutil.Process(instance.process.pid).children(recursive=True)
        assert len(started) >= 2  # the guard and the server
        request = Request(
            model=launch.model,
            input=TextInput(text="abc"),
            sampling=Sampling(max_tokens=5, temperature=0.0, ignore_eos=True),
        )
        task = Task(id=request.id, attempt=1, request=request, digest=digest, deadline_s=60)
        with open_session(instance.direct_url, spec.direct_token) as session:
            [events] = session.run([task])
        assert len(events) == 1 + 5 + 1
        assert '"output_tokens":5' in events[-1]
        asked = urllib.request.Request(
            "http" + instance.direct_url.removeprefix("ws") + "metrics",
            headers={"Authorization": f"Bearer {spec.direct_token}"},
        )
        with urllib.request.urlopen(asked, timeout=20) as reply:
            text = reply.read().decode()
        name = launch.model.partition("@")[0]
        # The canary's four, and these.
        assert f'vllm:generation_tokens_total{{model_name="{name}"}} 9.0' in text
        instance.process.kill()
        assert wait_ended(started, timeout_s=30) == []
