"""Checks a whole program before anything of it runs."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.errors import ProgramInvalid, ProgramTooLarge
from fabric.messages import nodes as n
from fabric.messages.points import PointManifest
from fabric.messages.program import Program, ProgramRun
from fabric.programs.caps import CAPS, ProgramCaps
from fabric.programs.checked import Checked, CheckedRun, Scope, dearest
from fabric.programs.constants import TensorSpec
from fabric.programs.run import RunCheck, Surroundings
from fabric.programs.saves import Joined


def check(
    program: Program,
    manifest: PointManifest,
    constants: Mapping[str, TensorSpec],
    *,
    artifacts: Mapping[str, TensorSpec] | None = None,
    caps: ProgramCaps = CAPS["batch"],
) -> Checked:
    """Check a program against a model's points, infer all shapes, and bound what it takes.

    A prompt that is a text has a bound of tokens and names for what depends on them. Whoever has
    the tokenizer replaces texts by ids, and spans by lists, and checks again: then all is exact.

    Args:
        program: As it came.
        manifest: The model's points.
        constants: The header of its constants; see ``read_header``.
        artifacts: Those that it refers to and may read, by ``id/run/save``.
        caps: Of its tier.

    Raises:
        ProgramInvalid: A node, a run or the whole cannot be what it says.
        PointUnknown: The model has no such point.
        PointRefused: A point cannot be read or written.
        ProgramTooLarge: It exceeds a cap, or its own limits.
    """
    hook_bytes_in = _hook_bytes_in(program, artifacts or {})
    for cap, value in (
        ("runs", len(program.runs)),
        ("nodes", program.num_nodes),
        ("constants_bytes", hook_bytes_in),
        ("generated_tokens", sum(run.gen.max_tokens for run in program.runs)),
    ):
        caps.hold(cap, value)
    around = Surroundings(
        manifest=manifest, constants=constants, artifacts=artifacts or {}, caps=caps
    )
    checks: list[RunCheck] = []
    runs: list[CheckedRun] = []
    saves: dict[tuple[str, str], Joined] = {}
    for run, depends_on in _in_order(program, constants):
        mine = {key: saved for key, saved in saves.items() if key[0] in depends_on}
        checks.append(RunCheck(run, around, mine, depends_on))
        runs.append(checks[-1].check())
        saves |= {(run.id, name): saved for name, saved in checks[-1].saves.items()}
        caps.hold("flops", sum(run.num_flops for run in runs))
    result_bytes = sum(run.result_bytes for run in runs)
    caps.hold("result_bytes", result_bytes)
    if result_bytes > program.limits.result_bytes:
        raise ProgramTooLarge(
            cap="limits.result_bytes", value=result_bytes, limit=program.limits.result_bytes
        )
    scopes: set[Scope] = set()
    return Checked(
        program=program,
        runs=tuple(runs),
        num_flops=sum(run.num_flops for run in runs),
        result_bytes=result_bytes,
        hook_bytes_in=hook_bytes_in,
        scopes=frozenset(scopes.union(*(checked.scopes for checked in checks))),
        lane=dearest(
            *(node.lane for run in runs for node in run.nodes),
            *(checked.overlay_lane for checked in checks),
        ),
    )


def _hook_bytes_in(program: Program, artifacts: Mapping[str, TensorSpec]) -> int:
    named = {
        f"{node.id}/{node.run}/{node.save}"
        for run in program.runs
        for node in run.nodes
        if isinstance(node, n.Artifact)
    }
    own = program.consts.size if program.consts is not None else 0
    return own + sum(artifacts[key].num_bytes for key in named if key in artifacts)


def _in_order(
    program: Program, constants: Mapping[str, TensorSpec]
) -> list[tuple[ProgramRun, tuple[str, ...]]]:
    """Return every run after those that it depends on, with their ids."""
    by_id: dict[str, ProgramRun] = {}
    for run in program.runs:
        if run.id in by_id:
            raise ProgramInvalid(run=run.id, reason="two runs have this id")
        by_id[run.id] = run
    waiting = {run.id: _depends_on(run, by_id, constants) for run in program.runs}
    wanted_by: dict[str, list[str]] = {}
    for run_id, others in waiting.items():
        for other in others:
            wanted_by.setdefault(other, []).append(run_id)
    missing = {run_id: len(others) for run_id, others in waiting.items()}
    ready = [run_id for run_id, count in missing.items() if not count]
    for run_id in ready:
        for other in wanted_by.get(run_id, ()):
            missing[other] -= 1
            if not missing[other]:
                ready.append(other)
    if len(ready) < len(by_id):
        stuck = next(run_id for run_id, count in missing.items() if count)
        raise ProgramInvalid(
            run=stuck, reason=f"it waits for itself: among {', '.join(waiting[stuck])} is a circle"
        )
    return [(by_id[run_id], waiting[run_id]) for run_id in ready]


def _depends_on(
    run: ProgramRun, by_id: Mapping[str, ProgramRun], constants: Mapping[str, TensorSpec]
) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for index, node in enumerate(run.nodes):
        if isinstance(node, n.Saved):
            if node.run not in by_id:
                raise ProgramInvalid(
                    run=run.id, node=index, reason=f"there is no run {node.run!r} to take from"
                )
            found[node.run] = None
    if run.start_at is not None and run.start_at.x not in constants:
        parts = run.start_at.x.split("/")
        prefixes = ("/".join(parts[:end]) for end in range(1, len(parts)))
        found |= dict.fromkeys(prefix for prefix in prefixes if prefix in by_id)
    return tuple(found)
