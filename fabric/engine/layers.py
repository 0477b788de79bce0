"""Decoder layers of Llama's kind run by one call of the kernels each, where nobody looks inside.

A step in which a hook acts inside a layer runs that layer's modules, as ever; the others are spared
their calls. What only adds a vector to a token, or keeps what stands there, the kernels do on their
way (``touches.py``), and so they do what deltas of short chunks add to linear layers. The bits are
the same. Which layers compute what Llama's do is decided by their source, as in ``fused.py``;
attention may see a window as well.

Shapes: N tokens of the step, E hidden size, D head size.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from fabric.engine.attention import Scoring, StepAttention
from fabric.engine.cache import KvCache
from fabric.engine.fused import Gate, RmsNorm, rotates_natively
from fabric.engine.linear import NativeWeight, get_native_weight
from fabric.engine.lowrank import Changes
from fabric.engine.native import Native, load_native
from fabric.engine.touches import Touches

_WINDOW = "sliding_window"
"""The option of the attention interface by which families with Llama's lines differ."""

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("packed", "scales", "bias")),
        *((name, _LONG) for name in ("inputs", "outputs")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("eps", _FLOAT))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Weight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _Norm) for name in ("before", "between")),
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _LONG) for name in ("heads", "kv_heads", "head_size", "window")),
        *((name, _FLOAT) for name in ("scale", "gate_a", "gate_b")),
        ("linears", _LONG * 7),
    )


class _Span(ctypes.Structure):
    _fields_ = (*((name, _LONG) for name in ("begin", "num", "start")), ("table", _POINTER))


class _Change(ctypes.Structure):
    _fields_ = (("num", _LONG), *((name, _POINTER) for name in ("tokens", "factors", "ranks")))


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _LONG)
          for name in ("num", "num_singles", "table_width", "num_spans", "num_changes")),
        *((name, _POINTER)
          for name in ("slots", "tables", "lengths", "spans", "changes", "room")),
    )  # fmt: skip


class WholeLayers:
    """The layers of one model that the kernels can run whole.

    Args:
        model: Its linear layers packed, its norms and activations fused.
        cache: Of its keys and values.
        linears: The linear layers that deltas can change, with their places in a delta's table.
        first_layer: The one that ``cache`` begins with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KvCache,
        *,
        linears: Mapping[nn.Module, int] = MappingProxyType({}),
        first_layer: int = 0,
    ) -> None:
        native = load_native() if cache.device.type == "cpu" else None
        self._layers: dict[int, _WholeLayer] = {}
        for module in model.modules():
            if native is not None and (weights := _weights(module)) is not None:
                index: int = module.self_attn.layer_idx
                pools = cache.layer(index - first_layer)
                self._layers[index] = _WholeLayer(native, module, weights, pools, linears)

    def learn(self, layer: int, scoring: Scoring) -> None:
        """Take over how the modules of a layer want its scores made: a layer that nothing is
        known of runs as modules."""
        if layer in self._layers:
            self._layers[layer].learn(scoring)

    @contextmanager
    def applied(
        self,
        attention: StepAttention,
        *,
        but: Collection[int] = (),
        touches: Mapping[int, Touches] = MappingProxyType({}),
        changes: Sequence[Changes] | None = (),
    ) -> Iterator[Collection[int]]:
        """Run layers whole inside this, but these and those whose modules someone has hooked; gives
        the layers that run so. What ``touches`` says of those is done, of others it is not; so are
        ``changes`` of their linear layers; without them, ``None``, no layer runs whole."""
        ready = {at: one for at, one in self._layers.items() if one.ready and at not in but}
        layers = ready.values()
        # The kernel for long chunks is of bfloat16 alone.
        taken = not attention.spans or all(layer.dtype == torch.bfloat16 for layer in layers)
        if changes is None or not ready or not taken or _has_any_global_hook():
            yield ()
            return
        most = max(layer.token_numbers for layer in layers)
        step = _WholeStep(attention, changes, most, next(iter(layers)).dtype)
        for at, layer in ready.items():
            # Past nn.Module's own bookkeeping, which takes longer than all the rest of this.
            layer.module.__dict__["forward"] = partial(layer.forward, step, touches.get(at))
        try:
            yield ready
        finally:
            for layer in layers:
                del layer.module.__dict__["forward"]


class _WholeStep:
    """What all layers of a step are told, and room for what they compute on the way."""

    def __init__(
        self,
        attention: StepAttention,
        changes: Sequence[Changes],
        token_numbers: int,
        dtype: torch.dtype,
    ) -> None:
        spans = attention.spans
        self._c_changes = (_Change * len(changes))(
            *(_Change(c.num_tokens, c.tokens, c.table, c.ranks) for c in changes)
        )
        self._c_spans = (_Span * len(spans))(
            *(_Span(s.begin, s.end - s.begin, s.start, s.table.data_ptr()) for s in spans)
        )
        self._pointed_to = attention, changes
        self.num = len(attention.slots_N)
        self.room = torch.empty(self.num * token_numbers, dtype=dtype)
        singles = attention.num_singles
        self.c = _Step(
            num=self.num,
            num_singles=singles,
            table_width=attention.tables.shape[1] if singles else 0,
            num_spans=len(spans),
            num_changes=len(changes),
            slots=attention.slots_N.data_ptr(),
            tables=attention.tables.data_ptr() if singles else None,
            lengths=attention.lengths_B.data_ptr() if singles else None,
            spans=ctypes.addressof(self._c_spans),
            changes=ctypes.addressof(self._c_changes),
            room=self.room.data_ptr(),
        )


class _WholeLayer:
    """One layer, as the kernels know it."""

    def __init__(
        self,
        native: Native,
        module: nn.Module,
        weights: tuple[NativeWeight, ...],
        pools: tuple[Tensor, Tensor],
        linears: Mapping[nn.Module, int],
    ) -> None:
        keys, values = pools
        norms = module.input_layernorm, module.post_attention_layernorm
        _, num_kv_heads, self._head_size = keys.shape
        qkv, out, gate_up, down = weights
        self.module = module
        self.dtype = keys.dtype
        self._native = native
        self._pointed_to = (weights, norms, pools)
        inside = [child for child in module.modules() if child is not module]
        self._hooks = [
            x for child in inside for x in (child._forward_hooks, child._forward_pre_hooks)
        ]
        self._learned = False
        self._c = _Layer(
            *map(_c_weight, weights),
            *(_Norm(norm.weight.data_ptr(), norm.variance_epsilon) for norm in norms),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            heads=out.num_inputs // self._head_size,
            kv_heads=num_kv_heads,
            head_size=self._head_size,
            gate_a=module.mlp.act_fn.a,
            gate_b=module.mlp.act_fn.b,
            linears=tuple(linears.get(one, -1) for group in _linears(module) for one in group),
        )
        self.token_numbers = (
            2 * qkv.num_inputs + qkv.num_outputs
            + (num_kv_heads * self._head_size + 2 * out.num_inputs)
            + gate_up.num_outputs + down.num_inputs
        )  # fmt: skip
        """Numbers that are made of a token on the way."""

    @property
    def ready(self) -> bool:
        """Whether it can run whole, and nobody would notice."""
        return self._learned and not any(self._hooks) and "forward" not in self.module.__dict__

    def learn(self, scoring: Scoring) -> None:
        """Take over how the modules want the scores made."""
        self._c.scale, self._c.window = scoring.scale, scoring.window
        self._learned = not scoring.cap

    def forward(
        self,
        step: _WholeStep,
        touches: Touches | None,
        hidden_states: Tensor,
        *more: object,
        position_embeddings: tuple[Tensor, Tensor],
        **named: object,
    ) -> Tensor:
        """Return what the module's ``forward`` returns, [1, N, E]."""
        cosine, sine = position_embeddings
        if not self._takes(step, hidden_states, cosine, sine):
            assert touches is None, "other tokens than the step's, and they would be touched"
            forward = type(self.module).forward
            named["position_embeddings"] = position_embeddings
            return forward(self.module, hidden_states, *more, **named)
        touched = None if touches is None else touches.address
        x, cosine, sine = hidden_states.contiguous(), cosine.contiguous(), sine.contiguous()
        return self._native.run_layer(self._c, step.c, touched, x, cosine, sine)

    def _takes(self, step: _WholeStep, x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
        return bool(
            x.shape[:2] == (1, step.num)
            and cosine.shape == sine.shape == (1, step.num, self._head_size)
            and x.dtype == cosine.dtype == sine.dtype == step.room.dtype
        )


def _weights(layer: nn.Module) -> tuple[NativeWeight, ...] | None:
    """Return the four weights of a layer that the kernels can run whole, else ``None``."""
    llama = modeling_llama
    if not _same_lines(layer, llama.LlamaDecoderLayer):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if not (_same_lines(attention, llama.LlamaAttention) and _same_lines(mlp, llama.LlamaMLP)):
        return None
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not (all(type(norm) is RmsNorm for norm in norms) and rotates_natively(attention)):
        return None
    weights = tuple(get_native_weight(group) for group in _linears(layer))
    return weights if all(weights) and type(mlp.act_fn) is Gate else None  # type: ignore[return-value]


def _linears(layer: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """Return the linear layers of a layer like Llama's, those together that are given the same."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _same_lines(module: nn.Module, of: type[nn.Module]) -> bool:
    return _lines(type(module).forward) == _lines(of.forward)


@functools.cache
def _lines(forward: Callable[..., object]) -> str:
    """Return what a function does, but for the window that it may hand to attention."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return repr(forward)
    assert isinstance(function, ast.FunctionDef)
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != _WINDOW]
    return "\n".join(map(ast.dump, function.body))


def _c_weight(weight: NativeWeight) -> _Weight:
    return _Weight(
        packed=weight.packed.data_ptr(),
        scales=None if weight.scales is None else weight.scales.data_ptr(),
        bias=None if weight.bias is None else weight.bias.data_ptr(),
        inputs=weight.num_inputs,
        outputs=weight.num_outputs,
    )
