"""A plain interpreter of intervention programs: the oracle that the engine is compared with.

One request at a time over an unmodified transformers model in float32, with PyTorch hooks and eager
attention. It shares no code with the engine or with ``fabric.programs``, and is made to be right at
sight, not fast: every node is evaluated in program order, a step at a time, and a point waits for
the forward pass to come by it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from fabric.messages import nodes as n
from fabric.messages.program import Program, ProgramRun
from fabric.testing.program_draws import draw_token
from fabric.testing.program_model import StopHere, Visited
from fabric.testing.program_ops import DTYPES, Known, changed, pure, reduced, sliced

_CHANGES = (n.Write, n.Project, n.Clamp, n.Skip)
_TOUCHING = (n.Read, *_CHANGES)
_SOURCES = (n.Const, n.Zeros, n.Saved, n.Artifact, n.TokenRows, n.WeightRead)
_END = "the end"
_REFS = ("cond", "x", "y", "v", "weight", "bias", "by", "like", "scalar", "mask", "gate")


@dataclass(slots=True)
class RunOutcome:
    """What one run gave.

    Args:
        saves: Joined over the steps, by name.
        positions: Of the saves whose first axis are positions.
        streamed: What was streamed, as (step, value), by name.
        tokens: Generated.
        logits: Of each step's last position, as they were sampled from.
    """

    saves: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, list[int]] = field(default_factory=dict)
    streamed: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Interpreter:
    """Runs programs over one model.

    Args:
        model: Llama-like, GPT-2-like, Gemma-like or Mixtral-like. Its attention is replaced by one
            that is written out, and its weights are kept from gradients; use a copy of your own.
        tokenizer: For prompts that are texts, and for spans.
        artifacts: By ``id/run/save``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    artifacts: Mapping[str, Tensor] = field(default_factory=dict)

    def run(
        self, program: Program, constants: Mapping[str, Tensor] | None = None
    ) -> dict[str, RunOutcome]:
        """Run a whole program, and return what each run gave, by id.

        Args:
            program: Valid; nothing is checked here.
            constants: By name; ``None``: those that the program carries.
        """
        if constants is None:
            constants = _carried(program)
        visited = Visited(self.model)
        visited.model.requires_grad_(False)
        outcomes: dict[str, RunOutcome] = {}
        waiting = list(program.runs)
        while waiting:
            ready = [run for run in waiting if _needs(run) <= outcomes.keys()]
            for run in ready:
                with visited.overlaid(run.overlays, constants):
                    outcomes[run.id] = _RunOfOne(self, visited, run, constants, outcomes).go()
            waiting = [run for run in waiting if run.id not in outcomes]
        return outcomes

    def encode(self, run: ProgramRun) -> list[int]:
        """Return a run's prompt as token ids."""
        if run.ids is not None:
            return list(run.ids)
        assert self.tokenizer is not None, "a text needs a tokenizer"
        ids: list[int] = self.tokenizer(run.text)["input_ids"]
        return ids

    def span(self, span: n.Span, ids: list[int]) -> list[int]:
        """Return the positions whose tokens cover a text."""
        assert self.tokenizer is not None, "a span needs a tokenizer"
        ends = [len(str(self.tokenizer.decode(ids[: i + 1]))) for i in range(len(ids))]
        begin = -1
        for _ in range(span.occurrence + 1):
            begin = str(self.tokenizer.decode(ids)).index(span.span, begin + 1)
        starts = [0, *ends[:-1]]
        return [
            i for i in range(len(ids)) if starts[i] < begin + len(span.span) and ends[i] > begin
        ]


class _RunOfOne:
    """One run of a program, step by step."""

    def __init__(
        self,
        interpreter: Interpreter,
        visited: Visited,
        run: ProgramRun,
        constants: Mapping[str, Tensor],
        others: Mapping[str, RunOutcome],
    ) -> None:
        self._interpreter = interpreter
        self._visited = visited
        self._run = run
        self._constants = constants
        self._others = others
        self._prompt = interpreter.encode(run)
        self._num_steps = max(1, run.gen.max_tokens)
        self._known: dict[int, Known] = {}
        self._saved: dict[int, list[tuple[int, Known]]] = {}
        self._latched: dict[int, float] = {}
        self._marked: dict[str, Tensor] = {}
        self._step = 0
        self._cursor = 0
        self._planned: list[set[int]] = []
        self._outcome = RunOutcome()
        self._plan()

    def go(self) -> RunOutcome:
        """Run all steps."""
        cache = DynamicCache()
        tokens = self._prompt
        with torch.set_grad_enabled(any(isinstance(node, n.Grad) for node in self._run.nodes)):
            for step in range(self._num_steps):
                self._step, self._cursor = step, 0
                token = self._forward(tokens, cache)
                self._visit(_END, torch.empty(0))
                if self._cursor < len(self._run.nodes):
                    raise RuntimeError(f"node {self._cursor} waits for a point that never came by")
                tokens = [token]
                if self._run.gen.max_tokens:
                    self._outcome.tokens.append(token)
                if not self._run.gen.ignore_eos and token in self._ends():
                    break
        self._join()
        return self._outcome

    def _forward(self, tokens: list[int], cache: DynamicCache) -> int:
        """Run a step's forward pass as far as it goes, and return the token it gives."""
        try:
            logits = self._visited.forward(tokens, cache, self._visit)[-1]
        except StopHere:
            return -1
        if self._run.gen.max_tokens == 0:
            return -1
        self._outcome.logits.append(logits.detach().clone())
        return self._sample(logits)

    def _plan(self) -> None:
        """Find the steps in which each node is evaluated; what is of sources alone, in step 0."""
        lasting: set[int] = set()
        for index, node in enumerate(self._run.nodes):
            moving = [self._planned[i] for i in _refs(node).values() if i not in lasting]
            since = max((min(steps, default=self._num_steps) for steps in moving), default=0)
            if isinstance(node, _TOUCHING):
                steps = {s for s in range(self._num_steps) if self._positions(node, s)}
            elif moving:
                steps = set[int]().union(*moving)
            else:
                steps = {0}
                lasting.add(index)
            self._planned.append({s for s in steps if s >= since})

    def _visit(self, point: str, h: Tensor, *, held: Tensor | None = None) -> Tensor:
        """Evaluate nodes in their order up to the first that waits for a later point."""
        where, _, layer = point.partition(".")
        if where == "before":
            if self._run.stop_at == int(layer):
                raise StopHere
            return h
        if where == "start":
            return self._started(int(layer), h)
        if point == "embed.out" and torch.is_grad_enabled():
            h = h.detach().requires_grad_()
        is_wrt = any(isinstance(node, n.Grad) and node.wrt == point for node in self._run.nodes)
        if is_wrt and held is None:
            # A tensor of its own, through which everything after the point goes.
            h = h.clone() if h.requires_grad else h.detach().clone().requires_grad_()
        while self._cursor < len(self._run.nodes):
            index, node = self._cursor, self._run.nodes[self._cursor]
            if self._step in self._planned[index]:
                if isinstance(node, _TOUCHING):
                    if _point(node) != point:
                        break
                    h = self._touch(index, node, h, in_place=held is not None)
                elif isinstance(node, n.Grad) and point != _END:
                    break
                else:
                    self._evaluate(index, node)
            self._cursor += 1
        if is_wrt:
            self._marked[point] = h if held is None else held
        return h

    def _started(self, layer: int, h: Tensor) -> Tensor:
        start = self._run.start_at
        if start is None or start.layer != layer or self._step:
            return h
        if start.x in self._constants:
            x = self._constants[start.x]
        else:
            (x,) = (
                saved
                for run, outcome in self._others.items()
                for name, saved in outcome.saves.items()
                if f"{run}/{name}" == start.x
            )
        x = x.to(h.dtype).clone()
        return x.requires_grad_() if torch.is_grad_enabled() else x

    def _touch(self, index: int, node: n.Node, h: Tensor, *, in_place: bool) -> Tensor:
        assert isinstance(node, _TOUCHING)
        at = self._positions(node, self._step)
        first = len(self._prompt) + self._step - 1 if self._step else 0
        rows = [position - first for position in at] if _point(node) != "sample" else [0]
        pick = [torch.tensor(rows)]
        if node.sel.heads is not None:
            pick.append(torch.tensor(node.sel.heads))
        elif h.dim() == 3:
            pick.append(torch.arange(h.shape[1]))
        if h.dim() > 1:
            every = torch.arange(h.shape[-1])
            pick.append(every if node.sel.dims is None else torch.tensor(node.sel.dims))
        grid = torch.meshgrid(*pick, indexing="ij")
        if isinstance(node, n.Read):
            self._known[index] = Known(h[grid].clone(), tuple(at))
            return h
        args = {name: self._known[i].x for name, i in _refs(node).items()}
        made = changed(node, h[grid], args)
        h = h if in_place else h.clone()
        h[grid] = made
        return h

    def _evaluate(self, index: int, node: n.Node) -> None:
        args = [self._known[i] for i in _refs(node).values()]
        match node:
            case n.Save():
                self._saved.setdefault(index, []).append((self._step, args[0]))
            case n.Const():
                self._known[index] = Known(self._constants[node.name])
            case n.Zeros():
                self._known[index] = Known(torch.full(node.shape, node.fill))
            case n.Artifact():
                key = f"{node.id}/{node.run}/{node.save}"
                self._known[index] = Known(self._interpreter.artifacts[key])
            case n.Saved():
                x = self._others[node.run].saves[node.save]
                x = x if node.positions is None else x[list(node.positions)]
                self._known[index] = Known(x.mean(0) if node.mean else x)
            case n.TokenRows():
                ids = torch.tensor(node.ids)
                unembedding = self._visited.model.get_output_embeddings().weight
                embeds = node.op == "model.embed"
                self._known[index] = Known(self._visited.embed(ids) if embeds else unembedding[ids])
            case n.WeightRead():
                self._known[index] = Known(self._weight(node))
            case n.Norm() | n.Unembed() | n.Module():
                self._known[index] = Known(self._module(node, args[0].x), _kept(args[0]))
            case n.Gate():
                self._known[index] = self._gate(index, node, args[0])
            case n.Grad():
                self._known[index] = self._gradient(node, args[0].x)
            case _:
                self._known[index] = pure(node, args, index)

    def _module(self, node: n.Norm | n.Unembed | n.Module, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        match node:
            case n.Norm():
                normed: Tensor = self._visited.norm(node.site).forward(x)
                return normed
            case n.Unembed():
                return self._visited.unembed(x)
            case n.Module() if node.module.startswith("layers."):
                return self._visited.layer_alone(int(node.module.split(".")[1]), x)
            case n.Module():
                return self._visited.matmul(node.module, x)

    def _weight(self, node: n.WeightRead) -> Tensor:
        weight = self._visited.model.get_parameter(node.name).detach()
        x = sliced(weight, node.index)
        if not node.stats:
            return x.clone()
        x = x.float()
        spread = (x - x.mean()).square().mean().sqrt()
        return torch.stack([x.mean(), spread, x.min(), x.max(), x.square().sum().sqrt()])

    def _gate(self, index: int, node: n.Gate, arg: Known) -> Known:
        known = pure(node, [arg], index)
        if not node.latch:
            return known
        opened: list[float] = []
        for each in known.x.tolist():
            self._latched[index] = max(each, self._latched.get(index, 0.0))
            opened.append(self._latched[index])
        return Known(torch.tensor(opened), known.at)

    def _gradient(self, node: n.Grad, scalar: Tensor) -> Known:
        at = self._positions(node, self._step)
        h = self._marked[node.wrt]
        (full,) = torch.autograd.grad(scalar, h, retain_graph=True, allow_unused=True)
        full = torch.zeros_like(h) if full is None else full
        full = full[0] if node.wrt.endswith(".mid") else full  # held with its axis of one
        picked = full[list(at)]
        if node.sel.heads is not None:
            picked = picked[:, list(node.sel.heads)]
        if node.sel.dims is not None:
            picked = picked[..., list(node.sel.dims)]
        return Known(picked, tuple(at))

    def _sample(self, logits: Tensor) -> int:
        chosen = draw_token(logits, self._run.gen, self._step)
        return int(self._visit("sample", torch.tensor([chosen]))[0])

    def _positions(self, node: n.Node, step: int) -> list[int]:
        """Return the positions at which a node acts in a step, in the order it names them."""
        sel: n.Selector = node.sel  # type: ignore[union-attr]
        num = len(self._prompt)
        begin, end = (0, num) if step == 0 else (num + step - 1, num + step)
        if sel.phase != "all" and (sel.phase == "prefill") != (step == 0):
            return []
        if sel.steps is not None and not sel.steps[0] <= step < sel.steps[1]:
            return []
        if sel.pos == "last" or _point(node) == "sample":
            return [end - 1]
        if sel.pos == "all":
            return list(range(begin, end))
        if isinstance(sel.pos, n.Span):
            wanted = self._interpreter.span(sel.pos, self._prompt)
        else:
            wanted = [position + num if position < 0 else position for position in sel.pos]
        return [position for position in wanted if begin <= position < end]

    def _ends(self) -> set[int]:
        ends = self._visited.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    def _join(self) -> None:
        for index, values in self._saved.items():
            node = self._run.nodes[index]
            assert isinstance(node, n.Save)
            dtype = None if node.dtype is None else DTYPES[node.dtype]
            if node.stream:
                self._outcome.streamed[node.name] = [
                    (step, _finished(known.x, node, dtype)) for step, known in values
                ]
                continue
            tensors = [known.x for _, known in values]
            labels = [position for _, known in values for position in known.at or ()]
            if len(self._planned[index]) == 1:
                joined = tensors[0]
            elif values[0][1].at is not None:
                joined = torch.cat(self._filled(node, tensors))
            else:
                joined = torch.stack(self._filled(node, tensors))
            if values[0][1].at is not None and node.reduce is None:
                self._outcome.positions[node.name] = labels
            self._outcome.saves[node.name] = _finished(joined, node, dtype)

    def _filled(self, node: n.Save, tensors: list[Tensor]) -> list[Tensor]:
        """Fill up the keys of earlier steps, which had fewer."""
        source = self._run.nodes[node.x]
        if not isinstance(source, n.Read) or not source.at.endswith(("scores", "pattern")):
            return tensors
        fill = -torch.inf if source.at.endswith("scores") else 0.0
        most = max(x.shape[-1] for x in tensors)
        return [torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=fill) for x in tensors]


def _finished(x: Tensor, node: n.Save, dtype: torch.dtype | None) -> Tensor:
    x = x if node.reduce is None else reduced(node.reduce, x)
    return x.detach().to(dtype or x.dtype).clone()


def _kept(arg: Known) -> tuple[int, ...] | None:
    return arg.at if arg.x.dim() > 1 else None


def _carried(program: Program) -> dict[str, Tensor]:
    if program.consts is None or program.consts.data is None:
        return {}
    tensors: dict[str, Tensor] = load(base64.b64decode(program.consts.data))
    return tensors


def _point(node: n.Node) -> str:
    if isinstance(node, n.Skip):
        return f"{node.module}.out"
    return str(getattr(node, "at", ""))


def _needs(run: ProgramRun) -> set[str]:
    found = {node.run for node in run.nodes if isinstance(node, n.Saved)}
    if run.start_at is not None and "/" in run.start_at.x:
        found.add(run.start_at.x.rpartition("/")[0])
    return found


def _refs(node: n.Node) -> dict[str, int]:
    if isinstance(node, n.Concat | n.Einsum):
        return {str(place): index for place, index in enumerate(node.args)}
    named = {name: getattr(node, name, None) for name in _REFS}
    return {name: index for name, index in named.items() if isinstance(index, int)}
