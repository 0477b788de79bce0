"""What is written in an endpoint's files, and what no text can do to them."""

import json
import os
import pwd
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema
import pytest
import yaml
from globus_compute_endpoint.endpoint.config import CoreEndpointConfig
from globus_compute_endpoint.endpoint.config.utils import render_config_user_template
from globus_compute_endpoint.endpoint.identity_mapper import MappedPosixIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.compute.endpoint import get_endpoint_files
from fabric.config import SiteSpec
from fabric.errors import SettingInvalid

FUNCTION = "9a947ba5-f537-4681-acf3-cc66485aadec"
DIRECTORY = Path("/srv/endpoint")
SLURM = {
    "scheduler": "slurm",
    "partition": "gpuA100x4",
    "account": "abcd-delta-gpu",
    "walltime": "01:00:00",
    "choices": {"partition": ["gpuH200x8"], "account": "any", "nodes_per_block": [1, 2]},
}
PLAIN = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="\u2028\u2029\ufeff")
)


def files(endpoint: dict[str, Any], **site: Any) -> dict[str, str]:
    spec = SiteSpec.model_validate({"name": "here", "endpoint": endpoint, **site})
    return get_endpoint_files(spec, DIRECTORY)


def rendered(template: str, options: dict[str, Any], schema: str = "{}") -> dict[str, Any]:
    """Render as the endpoint does before it starts a user endpoint."""
    me = MappedPosixIdentity(pwd.getpwuid(os.getuid()), [], UUID(int=0))
    text = render_config_user_template(
        CoreEndpointConfig(), template, Path(__file__), me, json.loads(schema), options, {}
    )
    config = yaml.safe_load(text)
    assert isinstance(config, dict)
    return config


def user_config(endpoint: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
    made = files(endpoint)
    return rendered(
        made["user_config_template.yaml.j2"], options or {}, made["user_config_schema.json"]
    )


def test_core_configuration_has_no_engine_and_names_its_functions() -> None:
    executor = {"kind": "globus-compute", "endpoint_id": FUNCTION, "functions": {"infer": FUNCTION}}
    made = files({"scheduler": "local"}, executor=executor, title="Here")
    config = yaml.safe_load(made["config.yaml"])
    assert config["display_name"] == "Here"
    assert config["allowed_functions"] == [FUNCTION]
    assert config["user_config_schema_path"] == "/srv/endpoint/user_config_schema.json"
    assert "engine" not in config
    assert "uv" not in made["user_config_template.yaml.j2"].split()


def test_without_functions_none_is_allowed() -> None:
    assert yaml.safe_load(files({"scheduler": "local"})["config.yaml"])["allowed_functions"] == []


def test_slurm_options_replace_the_administrators_values() -> None:
    provider = user_config(SLURM)["engine"]["provider"]
    assert provider["type"] == "SlurmProvider"
    assert provider["partition"] == "gpuA100x4"
    assert provider["walltime"] == "01:00:00"
    chosen = user_config(SLURM, {"account": "mine", "nodes_per_block": 2})["engine"]["provider"]
    assert (chosen["account"], chosen["nodes_per_block"]) == ("mine", 2)
    assert chosen["partition"] == "gpuA100x4"


def test_work_that_needs_no_block_runs_beside_the_endpoint() -> None:
    engine = user_config(SLURM, {"place": "login"})["engine"]
    assert engine["provider"]["type"] == "LocalProvider"
    assert engine["address"] == "127.0.0.1"


def test_running_instance_is_never_idle() -> None:
    config = user_config({"scheduler": "local", "heartbeat_s": 5, "idle_s": 61})
    assert config["idle_heartbeats_soft"] == 13
    assert config["idle_heartbeats_hard"] * config["heartbeat_period"] >= 365 * 86_400
    assert config["engine"]["heartbeat_threshold"] < 116


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"worker_init": "id"}, "worker_init"),
        ({"partition": "secret"}, "secret"),
        ({"nodes_per_block": 3}, "nodes_per_block"),
        ({"nodes_per_block": "1"}, "nodes_per_block"),
        ({"account": "a b"}, "account"),
        ({"account": "mine\n"}, "account"),
        ({"account": ["mine"]}, "account"),
        ({"place": "elsewhere"}, "place"),
        ({"walltime": "99:00:00"}, "walltime"),
        ({"_GC": {}}, "_GC"),
    ],
)
def test_option_outside_the_schema_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError), match=named):
        user_config(SLURM, options)


@settings(deadline=None)
@given(text=PLAIN, init=st.text(st.sampled_from("{}%#[]\"'\\\n\t $`é🌍a:-&*!|>")))
def test_administrators_text_arrives_as_it_was_written(text: str, init: str) -> None:
    endpoint = {"scheduler": "local", "display_name": text, "worker_init": init}
    made = files(endpoint)
    core = yaml.safe_load(made["config.yaml"])
    assert core["display_name"] == (text or "here")
    assert set(core) == set(yaml.safe_load(files({"scheduler": "local"})["config.yaml"]))
    config = rendered(made["user_config_template.yaml.j2"], {})
    assert config["engine"]["provider"].pop("worker_init") == init
    plain = user_config({"scheduler": "local"})
    del plain["engine"]["provider"]["worker_init"]
    assert config == plain


@settings(deadline=None)
@given(text=st.text(), other=st.text(st.sampled_from("{}%#[]\"'\\\n:-&*!|> ab")))
def test_callers_text_stays_one_value_even_without_the_schema(text: str, other: str) -> None:
    template = files(SLURM)["user_config_template.yaml.j2"]
    try:
        config = rendered(template, {"partition": text, "account": other})
    except yaml.YAMLError:
        return  # the endpoint refuses what YAML cannot hold
    provider = config["engine"]["provider"]
    assert isinstance(provider.pop("partition"), str)
    assert provider.pop("account") == other
    plain = user_config(SLURM)
    del plain["engine"]["provider"]["partition"], plain["engine"]["provider"]["account"]
    assert config == plain


def test_site_without_endpoint_says_what_to_write() -> None:
    with pytest.raises(SettingInvalid, match="scheduler: local"):
        get_endpoint_files(SiteSpec(name="here"), DIRECTORY)
