"""This machine is measured."""

from __future__ import annotations

import builtins
import sys

import psutil
import pytest

from fabric.errors import PackageMissing, PlanImpossible, RequestInvalid
from fabric.planning import HERE, get_plan, known_shape
from fabric.planning.here import measure_here


@pytest.mark.slow
def test_this_machine_is_one_device_of_the_size_that_it_has() -> None:
    device = measure_here()
    assert 0 < device.memory_bytes <= psutil.virtual_memory().total
    assert device.memory_bytes_s > 0
    plan = get_plan(known_shape("SmolLM2-135M"), device, context_tokens=16, batch=1)
    assert plan.machine.device.name == HERE
    assert any("estimates" in warning for warning in plan.warnings)
    with pytest.raises(RequestInvalid, match="one node of one device"):
        get_plan(known_shape("SmolLM2-135M"), device, num_nodes=2)
    with pytest.raises(PlanImpossible) as caught:
        get_plan(known_shape("Kimi-K2"), device)
    assert "--nodes" not in caught.value.message


def test_without_numpy_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "numpy":
            raise ImportError(name)
        return imported(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "numpy", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PackageMissing, match=r"fabric-inference\[site\]"):
        measure_here()
