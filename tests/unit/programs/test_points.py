"""Points by name: canonical forms, what a manifest says, and their order."""

from __future__ import annotations

import pytest

from fabric.errors import PointUnknown
from fabric.messages.points import PointManifest
from fabric.programs import canonical, layer_of, order_of, resolve


def test_brackets_are_another_way_to_write_a_layer() -> None:
    assert canonical(" layers[5].attn.out ") == "layers.5.attn.out"
    assert canonical("layers.5.attn.out") == "layers.5.attn.out"
    assert layer_of("layers.12.out") == 12
    assert layer_of("final.norm.out") is None


@pytest.mark.parametrize("text", ["", "Layers.5", "layers[-1].out", "a b", "x" * 500, "layers[]"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(PointUnknown):
        canonical(text)


def test_points_that_are_not_there_are_refused_with_what_is(manifest: PointManifest) -> None:
    for point, reason in (
        ("layers.2.out", "0 to 1"),
        ("layers.0.attn.ou", r"nearest is layers.\{i\}.attn.out"),
        ("unembed.out", "nearest is embed.out"),
        ("layers.0", "fabric points"),
        ("layers.999999.out", "0 to 1"),
    ):
        with pytest.raises(PointUnknown, match=reason):
            resolve(manifest, point)


def test_the_order_is_that_of_the_forward_pass(manifest: PointManifest) -> None:
    points = ["embed.out", "layers.0.in", "layers.0.attn.out", "layers.0.out", "layers[1].in",
              "layers.1.mlp.act", "layers.1.out", "final.norm.out", "logits", "sample"]  # fmt: skip
    orders = [order_of(manifest, point) for point in points]
    assert orders == sorted(orders)
    assert len(set(orders)) == len(orders)
    assert resolve(manifest, "layers.1.attn.z").shape == ("T", 4, 4)
