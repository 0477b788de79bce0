"""What a selector selects: the steps in which it acts, and how many positions in each."""

from __future__ import annotations

from dataclasses import dataclass

from fabric.messages.nodes import Selector, Span
from fabric.messages.program import ProgramRun
from fabric.programs.shapes import Axis, Unfit, number, shorten, unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How long a run is.

    Args:
        num_steps: Its steps, the prompt's among them.
        prompt: The prompt's tokens, or their bound.
        exact: Whether ``prompt`` is known, which it is of token ids.
        ends_early: Whether fewer steps may come.
        text: The prompt's text, where it has one.
    """

    num_steps: int
    prompt: int
    exact: bool
    ends_early: bool
    text: str | None

    @classmethod
    def of(cls, run: ProgramRun, context_tokens: int) -> Extent:
        """Return a run's extent; a text has at most a token a byte and one before it."""
        if run.ids is not None:
            prompt = len(run.ids)
        else:
            prompt = min(len((run.text or "").encode()) + 1, context_tokens)
        return cls(
            num_steps=max(1, run.gen.max_tokens),
            prompt=prompt,
            exact=run.ids is not None,
            ends_early=run.gen.max_tokens > 1 and not run.gen.ignore_eos,
            text=run.text,
        )

    @property
    def num_positions(self) -> int:
        """Positions that are run, or their bound: the last generated token is not."""
        return self.prompt + self.num_steps - 1

    def positions_in(self, step: int) -> int:
        """Return how many positions a step has."""
        return self.prompt if step == 0 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What a selector selects.

    Args:
        steps: As bits.
        positions: The axis ``T``.
        keys: The axis ``S``: all positions up to a step's last.
        earliest: The first position of the prompt, negative ones counted from its end; ``None``
            where none of the prompt is selected.
    """

    steps: int
    positions: Axis
    keys: Axis
    earliest: int | None


def select(sel: Selector, extent: Extent) -> Selected:
    """Return what a selector selects in a run of this extent.

    Raises:
        Unfit: It selects nothing, a position twice, or one past the end.
    """
    steps = _steps(sel, extent)
    keys: Axis | None = None
    match sel.pos:
        case "last":
            earliest = extent.prompt - 1 if extent.exact else -1
            positions = number(1)
        case "all":
            earliest = 0
            positions = _all_positions(steps, extent)
        case Span() as span:
            steps, earliest = _within_prompt(steps, "the text is in the prompt"), 0
            positions = _of_span(span, extent)
        case tuple() as listed:
            steps, positions, earliest = _listed(listed, steps, extent)
            if not extent.exact and steps.bit_count() > 1:
                # Which of these steps they are in is not known: it may well be one alone.
                keys = unknown(f"S{list(listed)}", extent.prompt + steps.bit_length() - 1)
    return Selected(
        steps=steps,
        positions=positions,
        keys=keys or _keys(steps, extent),
        earliest=earliest if steps & 1 else None,
    )


def last_of_each(sel: Selector, extent: Extent) -> Selected:
    """Return what is selected of a point that has one value a step, its last position's.

    Raises:
        Unfit: The selector names other positions, or selects no step.
    """
    if sel.pos not in ("all", "last"):
        raise Unfit("one token is sampled in a step, at its last position: leave out pos")
    return select(sel.model_copy(update={"pos": "last"}), extent)


def bits(begin: int, end: int) -> int:
    """Return the steps of a half-open range as bits."""
    return (1 << end) - (1 << begin) if end > begin else 0


def _steps(sel: Selector, extent: Extent) -> int:
    begin, end = {
        "prefill": (0, 1),
        "decode": (1, extent.num_steps),
        "all": (0, extent.num_steps),
    }[sel.phase]
    if sel.steps is not None:
        begin, end = max(begin, sel.steps[0]), min(end, sel.steps[1])
    if begin >= end:
        raise Unfit(
            f"phase {sel.phase!r} and steps {sel.steps} select none of the run's"
            f" {extent.num_steps} steps"
        )
    return bits(begin, end)


def _all_positions(steps: int, extent: Extent) -> Axis:
    if not steps & 1:
        return number(1)
    if steps == 1:
        return number(extent.prompt) if extent.exact else unknown("T[prompt]", extent.prompt)
    if extent.prompt == 1:
        return number(1)
    name = "T" if steps.bit_count() == extent.num_steps else f"T[{steps.bit_count()} steps]"
    total = extent.prompt + steps.bit_count() - 1
    return Axis(name, extent.prompt, 1, total, steps)


def _keys(steps: int, extent: Extent) -> Axis:
    first, last = (steps & -steps).bit_length() - 1, steps.bit_length() - 1
    name = f"S[{first}:{last + 1}]" if steps == bits(first, last + 1) else f"S[{steps:x}]"
    if first == last:
        most = extent.prompt + last
        return number(most) if extent.exact else unknown(name, most)
    total = (last - first + 1) * (2 * extent.prompt + first + last) // 2
    return Axis(name, extent.prompt + last, extent.prompt + first, total, steps)


def _within_prompt(steps: int, why: str) -> int:
    if not steps & 1:
        raise Unfit(f"{why}, and the selector leaves out the step that runs it")
    return 1


def _of_span(span: Span, extent: Extent) -> Axis:
    if extent.text is not None:
        place = -1
        for nth in range(span.occurrence + 1):
            place = extent.text.find(span.span, place + 1)
            if place < 0:
                raise Unfit(f"the prompt's text has {span.span[:64]!r} {nth} times")
    most = min(extent.prompt, len(span.span.encode()))
    return unknown(f"T[{span.span!r}, {span.occurrence}]", most)


def _listed(listed: tuple[int, ...], steps: int, extent: Extent) -> tuple[int, Axis, int]:
    if not listed:
        raise Unfit("its list of positions is empty")
    places = tuple(extent.prompt + p if p < 0 else p for p in listed) if extent.exact else listed
    if len(set(places)) != len(places):
        raise Unfit(f"a position stands twice in {_some(listed)}")
    least, most = min(places), max(places)
    if least < (0 if extent.exact else -extent.prompt) or most >= extent.num_positions:
        raise Unfit(
            f"the positions {_some(listed)} are not all among the {extent.num_positions} that the"
            " run has" + ("" if extent.exact else " at most")
        )
    if not extent.exact:
        return _listed_in_text(places, steps, extent)
    in_prompt = sum(place < extent.prompt for place in places)
    mine = sum(1 << (p - extent.prompt + 1) for p in places if p >= extent.prompt) | bool(in_prompt)
    if mine & ~steps:
        raise Unfit(f"the positions {_some(listed)} are not all run in the steps it selects")
    if in_prompt == len(places) or in_prompt == 0 or in_prompt == 1:
        return mine, number(max(1, in_prompt)), least
    return mine, Axis(shorten(f"T{list(places)}"), in_prompt, 1, len(places), mine), least


def _listed_in_text(places: tuple[int, ...], steps: int, extent: Extent) -> tuple[int, Axis, int]:
    from_end = [place for place in places if place < 0]
    earliest = max(-extent.prompt, min(from_end)) if len(from_end) == len(places) else 0
    if not from_end and steps & 1:
        earliest = min(places)
    if from_end or extent.num_steps == 1 or steps == 1:
        first = _within_prompt(steps, "positions of the prompt are named")
        if len(from_end) == len(places) or steps == 1:
            return first, number(len(places)), earliest
    if not steps & 1:
        return steps, number(1), earliest
    return steps, unknown(f"T{list(places)}", len(places)), earliest


def _some(places: tuple[int, ...]) -> str:
    return str(list(places)) if len(places) <= 32 else f"{list(places[:8])} and others"
