"""The model as one run sees it: its modules and weights, the run's overlays applied.

Shapes: T positions, O outputs and K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fabric.engine.attention import Chunk, Scoring, attend_causally
from fabric.engine.linear import PackedLinear
from fabric.engine.lowrank import Delta, Factors, LowRankLayers, Span
from fabric.engine.programs.anatomy import Anatomy, LayerParts
from fabric.engine.programs.values import indexed
from fabric.engine.programs.watch import given
from fabric.engine.runner import run_ragged
from fabric.errors import LowRankInvalid, ProgramInvalid, ProgramTooLarge
from fabric.messages import nodes as ops
from fabric.messages.program import LowRank, Normalized, Overlay, Rows, Scaled

MAX_PRIVATE_BYTES = 2**30
"""Of the weights that one run has for itself."""

_nested: ContextVar[bool] = ContextVar("fabric_nested", default=False)


def nested() -> bool:
    """Return whether a module is running for a node: hooks of the step do not count then."""
    return _nested.get()


class Weights:
    """The parameters of a model by name, before and after its layers are packed.

    Args:
        model: As it was loaded, nothing packed yet.
        reload: Loads it again, for what was given up since.
    """

    def __init__(self, model: PreTrainedModel, reload: Callable[[], PreTrainedModel]) -> None:
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._reload = reload
        names = {id(p): name for name, p in model.named_parameters()}
        self._owners: dict[str, list[tuple[str, str]]] = {}
        for path, p in model.named_parameters(remove_duplicate=False):
            module, _, parameter = path.rpartition(".")
            self._owners.setdefault(names[id(p)], []).append((module, parameter))
        self._name_of = {owner: name for name, all_ in self._owners.items() for owner in all_}
        self._outputs_last = {
            name for name, ((module, _), *_) in self._owners.items()
            if isinstance(model.get_submodule(module), Conv1D) and len(self.shapes[name]) == 2
        }  # fmt: skip

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The model with plain weights and modules that gradients go through; a second copy."""
        # Whoever needs it first may be in inference mode, whose tensors no gradient goes through.
        with torch.inference_mode(False):
            return self._reload()

    def owners(self, name: str) -> list[tuple[str, str]]:
        """Return the modules (and their parameters) that have the parameter."""
        return self._owners[name]

    def of(self, module: str, parameter: str = "weight") -> str:
        """Return a module's parameter's own name, which a tied one shares."""
        return self._name_of[module, parameter]

    def tensor(self, name: str, model: PreTrainedModel) -> Tensor:
        """Return a parameter of the running model, or of the plain one where that gave it up."""
        for module, parameter in self._owners[name]:
            owner = model.get_submodule(module)
            if isinstance(found := getattr(owner, parameter, None), Tensor):
                return found
        return self.plain.get_parameter(name)

    def changed(self, name: str, weight: Tensor, overlays: Sequence[Overlay],
                constants: Mapping[str, Tensor]) -> Tensor:  # fmt: skip
        """Return a weight with its overlays applied, in its own shape and dtype."""
        last = name in self._outputs_last
        w_OK = (weight.T if last else weight).float()
        for overlay in overlays:
            match overlay:
                case LowRank(u=u, v=v, alpha=alpha):
                    w_OK = w_OK + alpha * (constants[u].float() @ constants[v].float().T)
                case Scaled(k=k):
                    w_OK = w_OK * k
                case Rows(index=index, x=x):
                    w_OK = w_OK.index_copy(0, torch.tensor(index), constants[x].float())
                case Normalized(axis=axis):
                    w_OK = w_OK / torch.linalg.vector_norm(w_OK, dim=axis, keepdim=True)
        return (w_OK.T if last else w_OK).to(weight.dtype).contiguous()


class RunModel:
    """One run's model: serves its ``model.*`` and ``weight.read`` nodes.

    Args:
        model: That runs.
        anatomy: Its parts.
        weights: Its parameters.
        lowrank: Applies low-rank changes to it; ``None``: every overlay takes a private weight.
        overlays: The run's.
        constants: The program's.

    Raises:
        ProgramInvalid: An overlay does not fit its weight.
        ProgramTooLarge: Its private weights take too much.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy | None,
        weights: Weights,
        lowrank: LowRankLayers | None,
        *,
        overlays: Sequence[Overlay] = (),
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._anatomy, self._weights = model, anatomy, weights
        self._lowrank = lowrank
        self._changed: dict[str, Tensor] = {}
        self._overlays: dict[str, list[Overlay]] = {}
        self._constants = constants or {}
        self.deltas: tuple[Delta, ...] = ()
        self.private: dict[nn.Module, tuple[str, dict[str, Tensor]]] = {}
        """Modules that run with weights of the run's own: their names, and the weights."""
        for overlay in overlays:
            self._overlays.setdefault(overlay.weight, []).append(overlay)
        factors: dict[str, Factors] = {}
        for name, changes in self._overlays.items():
            if (one := self._low_rank(name, changes)) is not None:
                factors[weights.owners(name)[0][0]] = one
            else:
                self._make_private(name)
        if factors:
            assert lowrank is not None
            try:
                self.deltas = (lowrank.place(factors),)
            except LowRankInvalid as error:
                raise ProgramInvalid(reason=str(error).rstrip(".")) from error

    # Overlays.

    def _low_rank(self, name: str, changes: Sequence[Overlay]) -> Factors | None:
        """Return the changes as one product, where they are such and the layer can take it."""
        owners = self._weights.owners(name)
        sizes = {} if self._lowrank is None else self._lowrank.sizes
        if len(owners) > 1 or owners[0][0] not in sizes or owners[0][1] != "weight":
            return None
        found = [change for change in changes if isinstance(change, LowRank)]
        if len(found) != len(changes):
            return None
        ups = [self._constants[c.u].float() * c.alpha for c in found]
        downs = [self._constants[c.v].float() for c in found]
        return Factors(down_RK=torch.cat(downs, 1).T, up_OR=torch.cat(ups, 1))

    def _make_private(self, name: str) -> None:
        total = sum(w.nbytes for _, ws in self.private.values() for w in ws.values())
        weight = self._weights.tensor(name, self._model)
        if (total := total + weight.nbytes) > MAX_PRIVATE_BYTES:
            raise ProgramTooLarge(cap="private weights, bytes", value=total,
                                  limit=MAX_PRIVATE_BYTES)  # fmt: skip
        own = self.weight(name)
        for path, parameter in self._weights.owners(name):
            module = self._model.get_submodule(path)
            self.private.setdefault(module, (path, {}))[1][parameter] = own

    def weight(self, name: str) -> Tensor:
        """Return a parameter as this run has it."""
        if name not in self._changed:
            weight = self._weights.tensor(name, self._model)
            overlays = self._overlays.get(name, ())
            if not overlays:
                return weight
            self._changed[name] = self._weights.changed(name, weight, overlays, self._constants)
        return self._changed[name]

    # Modules.

    def apply(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what a module makes of ``x`` [..., F] for this run; no hook sees it."""
        x_1TF = x.reshape(1, -1, x.shape[-1]).to(self._model.dtype)
        with self._alone(x_1TF.shape[1]):
            if module in self.private:
                y = self.private_call(module, [x_1TF])
            else:
                y = module.forward(x_1TF)
        assert isinstance(y, Tensor)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def private_call(self, module: nn.Module, args: Sequence[object]) -> object:
        """Return what a module makes of its arguments with the run's own weights."""
        path, own = self.private[module]
        if isinstance(module, PackedLinear):
            module = self._weights.plain.get_submodule(path)
        with self._alone(0):
            return functional_call(module, own, tuple(args))

    @contextmanager
    def _alone(self, num_tokens: int) -> Iterator[None]:
        """Run modules on other tokens than the step's, with this run's deltas."""
        token = _nested.set(True)
        spans = [Span(start=0, stop=num_tokens, delta=d) for d in self.deltas if num_tokens]
        try:
            if self._lowrank is None:
                yield
            else:
                with self._lowrank.applied(spans):
                    yield
        finally:
            _nested.reset(token)

    # What nodes ask for.

    def call(self, node: ops.Node, x: Tensor | None) -> Tensor:
        """Return what a ``model.*`` or ``weight.read`` node stands for."""
        match node:
            case ops.Norm(site=site):
                assert x is not None
                return self.apply(self._norm(site), x)
            case ops.Unembed():
                assert x is not None
                return self._capped(self.apply(self._parts.head, x).float())
            case ops.TokenRows(op=op, ids=ids):
                return self._rows(op, torch.tensor(ids))
            case ops.Module(module=name):
                assert x is not None
                return self._module(name, x)
            case ops.WeightRead():
                return self._read(node)
        raise TypeError(f"{node.op} asks nothing of the model")

    @property
    def _parts(self) -> Anatomy:
        if self._anatomy is None:
            raise ProgramInvalid(reason="the parts of this model are not known by name")
        return self._anatomy

    def _norm(self, site: str) -> nn.Module:
        parts = self._parts
        found = parts.final_norm
        if site != "final.norm":
            _, index, place, *_ = site.split(".")
            layer = parts.layers[int(index)]
            found = layer.attention_norm if place == "attn" else layer.mlp_norm
        if found is None:
            raise ProgramInvalid(reason=f"the model has no norm at {site!r}")
        return found

    def _capped(self, logits: Tensor) -> Tensor:
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _rows(self, op: str, ids: Tensor) -> Tensor:
        parts = self._parts
        if op == "model.embed":
            with self._alone(0):
                if parts.embedding in self.private:
                    rows = self.private_call(parts.embedding, [ids])
                else:
                    rows = parts.embedding.forward(ids)
            assert isinstance(rows, Tensor)
            return rows
        path = next(name for name, m in self._model.named_modules() if m is parts.head)
        return self.weight(self._weights.of(path))[ids]

    def _module(self, name: str, x: Tensor) -> Tensor:
        path = name.removesuffix(".weight")
        if path.startswith("layers."):
            _, index, *rest = path.split(".")
            layer = self._parts.layers[int(index)]
            if not rest:
                return self._layer(layer, x)
            if rest == ["mlp"] and layer.mlp is not None:
                return self.apply(layer.mlp, x)
        else:
            module = dict(self._model.named_modules()).get(path)
            if module is not None:
                return self.apply(module, x)
        raise ProgramInvalid(reason=f"{name!r} is no layer (layers.5), MLP or matmul of the model")

    def _layer(self, parts: LayerParts, x_TH: Tensor) -> Tensor:
        """Run one layer: the model places its tokens, the layers before let them pass."""
        made: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            x = x_TH[None].to(given(args, kwargs))
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        def leave(_: nn.Module, __: object, output: object) -> None:
            x = output[0] if isinstance(output, tuple) else output
            assert isinstance(x, Tensor)
            made.append(x[0])
            raise _Enough

        before = [other.layer for other in self._parts.layers]
        before = before[: before.index(parts.layer)]
        hooks = [
            parts.layer.register_forward_pre_hook(enter, with_kwargs=True),
            parts.layer.register_forward_hook(leave),
        ]
        chunk = Chunk(tokens=[0] * len(x_TH), start=0, blocks=(), num_wanted=0)
        # What stands there for the step knows the step's tokens alone.
        of_step = {layer: vars(layer).pop("forward", None) for layer in (*before, parts.layer)}
        with self._alone(len(x_TH)):
            try:
                for layer in before:
                    layer.forward = _pass
                run_ragged(self._model, [chunk], _attend, grad=torch.is_grad_enabled())
            except _Enough:
                pass
            finally:
                for layer, forward in of_step.items():
                    vars(layer).pop("forward", None)
                    if forward is not None:
                        vars(layer)["forward"] = forward
                for hook in hooks:
                    hook.remove()
        return made[0]

    def _read(self, node: ops.WeightRead) -> Tensor:
        weight = indexed(self.weight(node.name), node.index).detach()
        if not node.stats:
            return weight.clone()
        w = weight.float()
        return torch.stack([w.mean(), w.std(correction=0), w.min(), w.max(), w.norm()])


class _Enough(Exception):
    """A layer has given its output."""


def _pass(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states


def _attend(
    _: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, options: Mapping[str, object]
) -> Tensor:
    return attend_causally(q, k, v, Scoring.of(scale, options, q.shape[2]))


class Exchange:
    """Within it these modules' parameters are replaced; within it a second time they are not.

    Args:
        private: Modules, and their new parameters.
    """

    def __init__(self, private: Mapping[nn.Module, tuple[str, Mapping[str, Tensor]]]) -> None:
        self._others: list[tuple[nn.Module, str, nn.Parameter | None]] = [
            (module, name, nn.Parameter(tensor, requires_grad=False))
            for module, (_, own) in private.items()
            for name, tensor in own.items()
        ]

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        for i, (module, name, other) in enumerate(self._others):
            self._others[i] = module, name, module._parameters[name]
            module._parameters[name] = other
