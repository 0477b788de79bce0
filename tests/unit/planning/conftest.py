"""A model and a device small enough to calculate by hand."""

from __future__ import annotations

import pytest

from fabric.planning import Device, ModelShape, shape_of


@pytest.fixture
def tiny() -> ModelShape:
    """Two layers: 576 numbers in matrices and 16 in norms each, and 800 at either end."""
    return shape_of(
        "tiny",
        {
            "model_type": "llama",
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 100,
            "max_position_embeddings": 64,
        },
    )


@pytest.fixture
def slate() -> Device:
    """A device that is easy to calculate with."""
    return Device(
        name="slate",
        title="a slate",
        memory_bytes=10_000,
        memory_bytes_s=1000.0,
        flops={"bf16": 10_000.0, "fp16": 10_000.0, "fp32": 1000.0},
        link_bytes_s=500.0,
        network_bytes_s=100.0,
        devices_per_node=2,
        source="a test",
    )
