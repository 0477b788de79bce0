"""What docs/serving.md shows is what is there: the site's options and the metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from fabric.gateway import Metrics
from fabric.instance.metrics import InstanceMetrics
from fabric.messages import EngineOptions
from fabric.testing.engine import FixedDelayEngine

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_sites_options_are_read() -> None:
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    options = EngineOptions.model_validate_json(json.dumps(yaml.safe_load(block)["options"]))
    assert (options.backend, options.vllm.command[-1]) == ("vllm", "serve")


def test_every_metric_named_is_rendered() -> None:
    instance, hub = InstanceMetrics("m"), Metrics()
    engine = FixedDelayEngine()
    instance.watch_load(engine)
    hub.watch_replicas(lambda: ())
    texts = {"instance": instance.render().decode(), "hub": hub.render().decode()}
    rows = re.findall(r"^\| (`(?:vllm:|fabric_).*) \| (both|instance|hub)", PAGE, re.MULTILINE)
    assert len(rows) > 8
    for names, where in rows:
        for name in re.findall(r"`((?:vllm:|fabric_)\w+)`", names):
            for place in texts if where == "both" else (where,):
                family = name.removesuffix("_total")
                assert re.search(rf"^# TYPE {family}(_total)? ", texts[place], re.MULTILINE), name
