"""What the engine that knows no model makes of programs: zeros, in the shapes they must have."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator

from fabric.errors import ProgramTooLarge
from fabric.messages import PointManifest, PointSpec, Program, Saves, Task
from fabric.messages.nodes import Save
from fabric.messages.program import ProgramRun
from fabric.programs import DTYPES, ITEM_BYTES, Checked, check, read_constants, read_header

NUM_LAYERS = 2
HIDDEN = 8
VOCABULARY = 4096
_FROM_WIRE = {name: dtype for dtype, name in DTYPES.items()}

Keep = Callable[[bytes], dict[str, object]]


def get_manifest(model: str, digest: str, context_tokens: int) -> PointManifest:
    """Return the points of the pretended model: residual streams, logits, and scores refused."""
    layers = tuple(range(NUM_LAYERS))
    return PointManifest(
        model=model,
        digest=digest,
        family="fixed",
        dtype="float32",
        num_layers=NUM_LAYERS,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        context_tokens=context_tokens,
        num_parameters=1000,
        points=(
            _point("embed.out", (), HIDDEN),
            _point("layers.{i}.in", layers, HIDDEN),
            PointSpec(
                pattern="layers.{i}.attn.scores",
                layers=layers,
                shape=("T", "S"),
                dtype="float32",
                read=False,
                write=False,
                lane="recompute",
                reason="this model has no attention",
            ),
            _point("layers.{i}.out", layers, HIDDEN),
            _point("final.norm.out", (), HIDDEN),
            _point("logits", (), VOCABULARY),
        ),
        weights={"head.weight": (VOCABULARY, HIDDEN)},
    )


def count_words(run: ProgramRun) -> int:
    """Return the tokens of a run's prompt: one a word, at least one."""
    return len(run.ids or ()) if run.text is None else max(1, len(run.text.split()))


class FixedProgram:
    """One program: checked as the hub checks it, and answered with zeros.

    Args:
        program: With its constants inline.
        manifest: The pretended model's points.

    Raises:
        ProgramError: It is not valid.
    """

    def __init__(self, program: Program, manifest: PointManifest) -> None:
        constants = read_constants(program)
        specs = {} if constants is None else read_header(constants)
        # With ids for the words there are no unknown lengths.
        runs = tuple(
            run.model_copy(update={"text": None, "ids": tuple(range(count_words(run)))})
            for run in program.runs
        )
        self.program = program
        self.hook_bytes_in = 0 if constants is None else len(constants)
        exact: Checked = check(program.model_copy(update={"runs": runs}), manifest, specs)
        self._checked = {one.run.id: one for one in exact.runs}

    @property
    def num_steps(self) -> int:
        """Tokens of the longest run."""
        return max(run.gen.max_tokens for run in self.program.runs)

    def saves(
        self, task: Task, *, step: int | None, keep: Keep | None, inline_bytes: int
    ) -> Iterator[Saves]:
        """Yield what is streamed in a step, or (``None``) all the rest, a run at a time.

        Raises:
            ProgramTooLarge: It does not fit inline and there is nowhere to keep it.
        """
        for run in self.program.runs:
            if step is not None and step > max(0, run.gen.max_tokens - 1):
                continue
            checked = self._checked[run.id]
            found = {
                node.name: (_FROM_WIRE[known.dtype], known.shape)
                for node, known in zip(run.nodes, checked.nodes, strict=True)
                if isinstance(node, Save) and node.stream == (step is not None)
            }
            if not found:
                continue
            data = zeros(found)
            where: dict[str, object] = {"data": base64.b64encode(data).decode()}
            if len(data) > inline_bytes:
                if keep is None:
                    raise ProgramTooLarge(
                        cap="saves inline, in bytes,", value=len(data), limit=inline_bytes
                    )
                where = {"handle": keep(data)}
            yield Saves.model_validate(
                {
                    "task_id": task.id,
                    "attempt": task.attempt,
                    "run": run.id,
                    "step": step,
                    "names": tuple(found),
                    "size": len(data),
                    **where,
                }
            )


def zeros(tensors: dict[str, tuple[str, tuple[int | str, ...]]]) -> bytes:
    """Return a safetensors file of zeros.

    Args:
        tensors: Type (safetensors' name) and shape by name; what is still a name counts as 1.
    """
    header: dict[str, object] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        sizes = [size if isinstance(size, int) else 1 for size in shape]
        begin, end = end, end + math.prod(sizes) * ITEM_BYTES[DTYPES[dtype]]
        header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + bytes(end)


def _point(pattern: str, layers: tuple[int, ...], width: int) -> PointSpec:
    return PointSpec(
        pattern=pattern,
        layers=layers,
        shape=("T", width),
        dtype="float32",
        read=True,
        write=True,
        lane="boundary",
    )
