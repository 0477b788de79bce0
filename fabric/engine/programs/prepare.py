"""Makes a program ready to run: constants read, prompts tokenized, everything checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import load
from torch import Tensor

from fabric.engine.cache import BLOCK_TOKENS
from fabric.engine.text import Texts
from fabric.errors import (
    CacheExhausted,
    ContextExceeded,
    DigestMismatch,
    ProgramInvalid,
    RequestInvalid,
)
from fabric.messages import Limits, PointManifest, Program, Task, TextInput
from fabric.messages import nodes as ops
from fabric.messages.program import ProgramRun
from fabric.programs import CAPS, Checked, check, read_constants, read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A program whose prompts are ids and whose spans are positions, and its constants."""

    checked: Checked
    constants: Mapping[str, Tensor]


class Preparer:
    """What programs are checked against.

    Args:
        texts: The model's tokenizer.
        manifest: The model's points.
        limits: Of the instance.
    """

    def __init__(self, texts: Texts, manifest: PointManifest, limits: Limits) -> None:
        self._texts = texts
        self._manifest = manifest
        self._limits = limits

    def prepare(self, program: Program, *, task: Task) -> Prepared:
        """Return the program, checked with everything known.

        Raises:
            DigestMismatch: The task is for another version of the model.
            ProgramError: It is not valid, too large, or asks for what the model cannot serve.
            ContextExceeded: A run is longer than the context.
            CacheExhausted: A run would not even fit an empty cache.
            RequestInvalid: A prompt has ids that the model does not know.
        """
        if task.digest != self._manifest.digest:
            name, actual = task.request.model, self._manifest.digest
            raise DigestMismatch(name=name, expected=task.digest, actual=actual)
        data = read_constants(program)
        if program.consts is not None and data is None:
            raise ProgramInvalid(
                reason="its constants are stored elsewhere; whoever sends it here fetches them"
            )
        specs = {} if data is None else read_header(data)
        runs = tuple(self._known(run) for run in program.runs)
        known = program.model_copy(update={"runs": runs})
        checked = check(known, self._manifest, specs, caps=CAPS[task.request.tier])
        for run in runs:
            self._fits(run)
        return Prepared(checked=checked, constants={} if data is None else load(data))

    def _known(self, run: ProgramRun) -> ProgramRun:
        """Return a run with ids for its text, and positions for its spans."""
        if run.text is None:
            ids = list(run.ids or ())
            self._texts.check_ids(ids, param=f"runs[{run.id!r}].ids")
            pieces = [self._texts.token_text(token_id) for token_id in ids]
            ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))] if any(
                _has_span(node) for node in run.nodes
            ) else []  # fmt: skip
            text = "".join(pieces)
            offsets = [(end - len(piece), end) for end, piece in zip(ends, pieces, strict=False)]
        else:
            text = run.text
            ids = self._texts.prompt_ids(TextInput(text=text))
            offsets = self._texts.offsets(text)
        nodes = tuple(
            self._placed(run.id, k, node, text, offsets) if _has_span(node) else node
            for k, node in enumerate(run.nodes)
        )
        return run.model_copy(update={"text": None, "ids": tuple(ids), "nodes": nodes})

    def _placed(
        self, run: str, index: int, node: ops.Node, text: str, offsets: list[tuple[int, int]]
    ) -> ops.Node:
        sel: ops.Selector = node.sel  # type: ignore[union-attr]
        assert isinstance(sel.pos, ops.Span)
        span, begin = sel.pos.span, -1
        for _ in range(sel.pos.occurrence + 1):
            begin = text.find(span, begin + 1)
            if begin < 0:
                raise ProgramInvalid(
                    run=run,
                    node=index,
                    reason=f"the text {span[:64]!r} is not found (place {sel.pos.occurrence}) in"
                    " the run's prompt",
                )
        end = begin + len(span)
        at = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > begin)
        if not at:
            raise ProgramInvalid(run=run, node=index, reason=f"no token covers {span[:64]!r}")
        return node.model_copy(update={"sel": sel.model_copy(update={"pos": at})})

    def _fits(self, run: ProgramRun) -> None:
        num_prompt, num_new = len(run.ids or ()), run.gen.max_tokens
        if num_prompt + num_new > self._limits.context_tokens:
            raise ContextExceeded(
                prompt_tokens=num_prompt,
                max_tokens=num_new,
                context_tokens=self._limits.context_tokens,
            )
        needed = -(-(num_prompt + num_new) // BLOCK_TOKENS) * BLOCK_TOKENS
        if needed > self._limits.cache_tokens:
            raise CacheExhausted(needed_tokens=needed, cache_tokens=self._limits.cache_tokens)
        if not run.ids:
            raise RequestInvalid(param="prompt", value="", reason=f"run {run.id!r} has no tokens")


def _has_span(node: ops.Node) -> bool:
    sel = getattr(node, "sel", None)
    return sel is not None and isinstance(sel.pos, ops.Span)
