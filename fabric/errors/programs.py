"""Intervention programs that are not valid, too large, or that failed."""

from __future__ import annotations

from fabric.errors.base import FabricError


class ProgramError(FabricError):
    """An intervention program is not valid or cannot be run here."""

    code = "program_error"
    http_status = 400


class ProgramInvalid(ProgramError):
    """A run or a node of a program cannot be what it says.

    Args:
        run: The run's id; empty where the program as a whole is meant.
        node: The node's index in its run; ``None`` where the run as a whole is meant.
        reason: What is wrong, with the value, and what to do about it.
    """

    code = "program_invalid"

    def __init__(self, *, reason: str, run: str = "", node: int | None = None) -> None:
        super().__init__(
            f"{where(run, node)} is not valid: {reason}.", run=run, node=node, reason=reason
        )


class PointUnknown(ProgramError):
    """The model has no point of this name."""

    code = "point_unknown"

    def __init__(self, *, point: str, reason: str, run: str = "", node: int | None = None) -> None:
        super().__init__(
            f"{where(run, node)} names the point {point!r}, which this model does not have:"
            f" {reason}. `fabric points MODEL` lists them.",
            point=point,
            reason=reason,
            run=run,
            node=node,
        )


class PointRefused(ProgramError):
    """The model has this point and cannot serve what is asked of it."""

    code = "point_refused"
    http_status = 422

    def __init__(
        self, *, point: str, access: str, reason: str, run: str = "", node: int | None = None
    ) -> None:
        super().__init__(
            f"{where(run, node)} wants to {access} {point!r}, which this model cannot serve:"
            f" {reason}. `fabric points MODEL` lists what it can.",
            point=point,
            access=access,
            reason=reason,
            run=run,
            node=node,
        )


class ProgramTooLarge(ProgramError):
    """A program exceeds a cap of its tier, of its own limits or of the format."""

    code = "program_too_large"
    http_status = 413

    def __init__(self, *, cap: str, value: float, limit: float) -> None:
        # Bounds multiply: a number of a thousand digits is no help to anybody.
        shown = value if value < 2**63 else f"over {2**63}"
        super().__init__(
            f"The program's {cap} may be {shown}, and at most {limit} are allowed; ask for less"
            " (fewer positions, a reduction before saving, several programs), or in a tier that"
            " allows more.",
            cap=cap,
            value=shown,
            limit=limit,
        )


class ProgramFailed(ProgramError):
    """A valid program could not be carried out; the same one would fail again."""

    code = "program_failed"
    http_status = 422

    def __init__(self, *, reason: str, run: str = "", node: int | None = None) -> None:
        super().__init__(f"{where(run, node)} failed: {reason}.", run=run, node=node, reason=reason)


def where(run: str, node: int | None) -> str:
    """Return the beginning of a sentence about a run or one of its nodes."""
    if not run:
        return "The program"
    return f"The run {run!r}" if node is None else f"Node {node} of the run {run!r}"
