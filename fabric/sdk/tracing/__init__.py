"""Reading and changing a served model's forward pass, from lines of Python.

::

    import fabric

    with fabric.trace("model@revision", "The Eiffel Tower is in") as t:
        h = t.layers[5].attn.out.save()
        t.layers[8].out += 4.0 * v
        top = t.logits[-1].topk(10).save()
    print(h.value.shape, top.value.indices)

The lines are never sent: they record nodes of an intervention program (``fabric.messages.program``)
which is checked here, priced by the hub, and run beside everybody else's requests when the block
is over. What does not compile is a ``TraceError`` that names the line.
"""

from fabric.sdk.tracing.backend import Backend, InProcess, LocalEngine
from fabric.sdk.tracing.edit import Edit
from fabric.sdk.tracing.places import Place
from fabric.sdk.tracing.session import Session, Target, Trace, session, trace
from fabric.sdk.tracing.sweep import Grid, NamedArray
from fabric.sdk.tracing.values import Saved, TopK, TopKArrays, Value

__all__ = [
    "Backend",
    "Edit",
    "Grid",
    "InProcess",
    "LocalEngine",
    "NamedArray",
    "Place",
    "Saved",
    "Session",
    "Target",
    "TopK",
    "TopKArrays",
    "Trace",
    "Value",
    "session",
    "trace",
]
