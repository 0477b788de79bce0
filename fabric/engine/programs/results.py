"""What runs saved, as events: safetensors files, inline or kept elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save

from fabric.engine.programs.values import Value
from fabric.errors import ProgramTooLarge
from fabric.messages import Saves, Task
from fabric.messages.program import MAX_INLINE_BYTES

Keep = Callable[[bytes], dict[str, object]]
"""Takes a safetensors file and returns the handle under which it will be found."""


def pack(saves: Mapping[str, Value]) -> bytes:
    """Return a safetensors file of the saves, with the positions of those that have them."""
    positions = {
        f"positions:{name}": json.dumps(list(value.at))
        for name, value in saves.items()
        if value.at is not None
    }
    with torch.inference_mode():
        tensors = {name: value.data.contiguous().clone() for name, value in saves.items()}
        data: bytes = save(tensors, metadata=positions or None)
    return data


def saves_event(
    task: Task, run: str, saves: Mapping[str, Value], keep: Keep | None, *, step: int | None = None
) -> Saves:
    """Return the event of what a run saved, or streams in a step.

    Raises:
        ProgramTooLarge: It is too large to be sent, and there is nowhere to keep it.
    """
    data = pack(saves)
    inline = len(data) <= MAX_INLINE_BYTES
    if not inline and keep is None:
        raise ProgramTooLarge(
            cap="result of one run, bytes (this instance keeps none)",
            value=len(data),
            limit=MAX_INLINE_BYTES,
        )
    return Saves(
        task_id=task.id,
        attempt=task.attempt,
        run=run,
        step=step,
        names=tuple(saves),
        size=len(data),
        data=base64.b64encode(data).decode() if inline else None,
        handle=None if inline or keep is None else keep(data),
    )
