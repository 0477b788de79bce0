"""Which nodes a node refers to."""

from __future__ import annotations

from fabric.messages import nodes as n

_FIELDS = (
    "cond", "x", "y", "v", "weight", "bias", "by", "like", "scalar", "mask", "gate", "args",
)  # fmt: skip


def references(node: n.Node) -> dict[str, int]:
    """Return the nodes that a node takes, by the field that names them, in the order it has them.

    Those of ``args`` are called ``args[0]``, ``args[1]`` and so on.
    """
    found: dict[str, int] = {}
    for field in _FIELDS:
        match getattr(node, field, None):
            case int(index):
                found[field] = index
            case tuple(indices):
                found |= {f"{field}[{place}]": index for place, index in enumerate(indices)}
    return found
