"""Runs of mode ``program``: what they return, what they are charged, what ends them."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.broker.cost import expected_tokens
from fabric.broker.facts import ReplicaSnapshot
from fabric.broker.programs import MAX_DEVICE_S, ProgramBounds, get_bounds, get_digest
from fabric.broker.signals import AbandonAttempt, Admitted, SendTask, Settle, Void
from fabric.errors import ProgramFailed
from fabric.ledger import TIERS, Rate, charge_usu, max_charge_usu
from fabric.messages import (
    EMBED_SAMPLING,
    Accepted,
    Finished,
    InstanceState,
    Program,
    ProgramInput,
    Request,
    RunCompleted,
    Saves,
    Token,
    Usage,
)
from fabric.programs import check
from fabric.testing import broker_rig
from fabric.testing.broker_rig import DIGEST, Rig, key, make_ticket, offer
from fabric.testing.fixed_programs import get_manifest

READ = {"op": "read", "at": "layers.1.out"}
SAVE = {"op": "save", "name": "h", "x": 0}
BOUNDS = ProgramBounds(
    program="ab" * 32,
    scopes=frozenset({"program:read"}),
    num_flops=1000,
    prompt_tokens=5,
    max_tokens=(0, 2),
    run_ids=("a", "b"),
    saving=frozenset({"a", "b"}),
    hook_bytes_in=100,
    hook_bytes_out=64,
    device_s=2.0,
)


def make_program(*, stream: bool = False) -> Program:
    nodes = [READ, {**SAVE, "stream": stream}]
    runs = [
        {"id": "a", "text": "one", "nodes": nodes},
        {"id": "b", "ids": [1, 2], "nodes": nodes, "gen": {"max_tokens": 2}},
    ]
    return Program.model_validate({"runs": runs})


def program_ticket(**changes: Any) -> Any:
    plain = make_ticket(offers=[offer("alpha"), offer("beta")])
    request = Request(
        id=plain.request.id,
        mode="program",
        model="smol",
        input=ProgramInput(program=make_program()),
        sampling=EMBED_SAMPLING,
        **changes,
    )
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return type(plain)(**fields | {"request": request, "bounds": BOUNDS})


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:

    # The rig's instances say that they run programs.
    limits = broker_rig.Limits
    monkeypatch.setattr(
        broker_rig, "Limits", lambda **fields: limits(**fields, modes=("query", "program"))
    )
    return Rig("alpha", "beta")


def begin(rig: Rig, **changes: Any) -> SendTask:
    out = rig.feed(Admitted(now=rig.now, started_at=rig.now, ticket=program_ticket(**changes)))
    return next(one for one in out if isinstance(one, SendTask))


def saves(sent: SendTask, run: str, size: int = 9, **changes: Any) -> Saves:
    fields = {"run": run, "names": ("h",), "size": size}
    data = base64.b64encode(bytes(size)).decode()
    return Saves(**key(sent), **{**fields, "data": data, **changes})


def token(sent: SendTask, choice: int, position: int, *, last: bool = False) -> Token:
    return Token(
        **key(sent),
        choice=choice,
        position=position,
        token_id=7,
        text="t",
        finish_reason="length" if last else None,
    )


def finished(sent: SendTask, **usage: Any) -> Finished:
    return Finished(**key(sent), finish_reasons=("length", "length"), usage=Usage(**usage))


def play(rig: Rig, sent: SendTask, **usage: Any) -> None:
    """The instance does all that the program asks for."""
    rig.say(sent, Accepted(**key(sent), prompt_tokens=3))
    rig.say(sent, saves(sent, "a"))
    rig.say(sent, token(sent, 1, 0))
    rig.say(sent, token(sent, 1, 1, last=True))
    rig.say(sent, saves(sent, "b"))
    rig.say(sent, finished(sent, **usage))


REPORTED = {"prompt_tokens": 3, "output_tokens": 2, "hook_bytes_in": 100, "hook_bytes_out": 18}


def test_what_runs_save_and_generate_reaches_the_client_in_order(rig: Rig) -> None:
    sent = begin(rig)
    play(rig, sent, **REPORTED)
    assert [one.run for one in rig.emitted(Saves)] == ["a", "b"]
    assert [one.position for one in rig.emitted(Token)] == [0, 1]
    (completed,) = rig.emitted(RunCompleted)
    assert completed.usage == Usage(**REPORTED)


def test_a_site_cannot_charge_for_more_than_arrived(rig: Rig) -> None:
    much = dict.fromkeys(("prompt_tokens", "output_tokens", "hook_bytes_in"), 10**6)
    sent = begin(rig)
    play(rig, sent, **much, hook_bytes_out=10**6, device_s=10**4)
    (completed,) = rig.emitted(RunCompleted)
    assert completed.usage.hook_bytes_out == 18
    assert completed.usage.hook_bytes_in == 100
    assert (completed.usage.prompt_tokens, completed.usage.output_tokens) == (3, 2)
    (settle,) = rig.all(Settle)
    assert settle.outcome.charge_usu <= 500


@pytest.mark.parametrize(
    "fault",
    [
        {"run": "c"},
        {"size": 65},
        {"size": 8, "data": base64.b64encode(bytes(9)).decode()},
        {"data": None},
        {"handle": {"artifact": "art_" + "0" * 32}},
    ],
    ids=["unknown run", "too much", "another size", "nothing", "twice"],
)
def test_saves_that_break_the_rules_move_the_program_elsewhere(
    rig: Rig, fault: dict[str, Any]
) -> None:
    sent = begin(rig)
    rig.say(sent, Accepted(**key(sent), prompt_tokens=3))
    out = rig.say(sent, saves(sent, **{"run": "a", **fault}))
    assert any(isinstance(one, AbandonAttempt) for one in out)
    assert not rig.emitted(Saves)
    again = next(one for one in rig.all(SendTask) if one.task.attempt == 2)
    assert again.instance != sent.instance


def test_saves_after_a_runs_last_break_a_program_that_has_begun(rig: Rig) -> None:
    sent = begin(rig)
    rig.say(sent, Accepted(**key(sent), prompt_tokens=3))
    rig.say(sent, saves(sent, "a"))
    rig.say(sent, saves(sent, "a"))
    assert rig.failure().code == "stream_broken"


def test_a_program_is_not_over_before_all_it_saves_is_there(rig: Rig) -> None:
    sent = begin(rig)
    rig.say(sent, Accepted(**key(sent), prompt_tokens=3))
    rig.say(sent, finished(sent))
    assert not rig.emitted(RunCompleted)
    assert len(rig.all(SendTask)) == 2


def test_a_program_is_retried_before_its_first_event_and_never_after(rig: Rig) -> None:
    sent = begin(rig)
    rig.lose(sent)
    again = rig.all(SendTask)[-1]
    assert (again.task.attempt, again.task.prefix) == (2, ())
    rig.say(again, Accepted(**key(again), prompt_tokens=3))
    rig.say(again, saves(again, "a"))
    rig.lose(again)
    failure = rig.failure()
    assert failure.code == "stream_broken"
    assert "program" in failure.message
    (settle,) = rig.all(Settle)
    assert settle.outcome.usage.hook_bytes_out == 9
    assert settle.outcome.usage.device_s == 0.0


def test_a_program_that_fails_before_anything_came_is_free(rig: Rig) -> None:

    sent = begin(rig)
    rig.say(sent, Accepted(**key(sent), prompt_tokens=3))
    rig.fail(sent, ProgramFailed(reason="NaN", run="a", node=0), prompt_tokens=3, device_s=1.0)
    assert rig.failure().code == "program_failed"
    assert len(rig.all(Void)) == 1


def test_an_accepted_program_may_compute_in_silence(rig: Rig) -> None:
    sent = begin(rig)
    rig.say(sent, Accepted(**key(sent), prompt_tokens=3))
    rig.tick(200.0)
    assert len(rig.all(SendTask)) == 1
    play_rest = [saves(sent, "a"), token(sent, 1, 0), token(sent, 1, 1, last=True)]
    for event in (*play_rest, saves(sent, "b"), finished(sent, **REPORTED)):
        rig.say(sent, event)
    assert rig.emitted(RunCompleted)


def test_what_a_program_computes_says_nothing_of_a_replicas_pace(rig: Rig) -> None:
    sent = begin(rig)
    rig.now += 50.0
    play(rig, sent, **REPORTED)
    (one,) = (s for s in rig.state.fleet.snapshots(rig.now) if s.instance == sent.instance)
    assert (one.overhead_s, one.correction) == (0.0, 1.0)


def test_replicas_that_run_no_programs_are_left_out() -> None:
    rig = Rig("alpha")
    rig.feed(admitted := _admitted(rig))
    assert not rig.all(SendTask)
    rig.tick(20.0)
    assert rig.failure().code == "no_replica"
    assert "runs no programs" in rig.failure().message
    assert admitted.ticket.program == "ab" * 32


def _admitted(rig: Rig) -> Any:
    return Admitted(now=rig.now, started_at=rig.now, ticket=program_ticket())


# ---- bounds --------------------------------------------------------------------------------------


def snapshot(prefill: float, decode: float) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        instance="i",
        site="alpha",
        digest=DIGEST,
        state=InstanceState.READY,
        ejected=False,
        context_tokens=64,
        max_rows=4,
        num_busy=0,
        num_in_flight=0,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
    )


def test_the_slowest_replica_sets_the_seconds_and_the_program_caps_them() -> None:
    program = make_program()
    manifest = get_manifest("smol", DIGEST, 64)
    checked = check(program, manifest, {})

    def device_s(*replicas: ReplicaSnapshot, tier: str = "standard") -> float:
        bounds = get_bounds(checked, manifest, replicas, digest="d", prompt_tokens=6, tier=tier)
        assert (bounds.output_tokens, bounds.saving) == (2, {"a", "b"})
        return bounds.device_s

    quick, slow = snapshot(1e6, 1e6), snapshot(1.0, 0.5)
    assert device_s(quick) == device_s() == 1.0
    assert device_s(quick, slow) == device_s(slow) > 4 * (6 / 1.0 + 2 / 0.5) - 1e-9
    assert device_s(snapshot(0.01, 0.01)) == program.limits.device_s
    hour = program.model_copy(
        update={"limits": program.limits.model_copy(update={"device_s": 3600.0})}
    )
    checked = check(hour, manifest, {})
    assert device_s(snapshot(0.01, 0.01), tier="interactive") == MAX_DEVICE_S["interactive"]


def test_a_digest_is_of_what_a_program_means() -> None:
    plain = make_program()
    spelled_out = Program.model_validate_json(plain.model_dump_json())
    assert get_digest(spelled_out) == get_digest(plain)
    assert get_digest(make_program(stream=True)) != get_digest(plain)


def test_a_program_is_expected_to_take_its_prompts_and_its_longest_run() -> None:
    request = program_ticket().request
    assert expected_tokens(request) == (4, 2)


prices = st.decimals(0, 100, places=6, allow_nan=False)
counts = st.integers(0, 10**9)


@given(
    st.lists(prices, min_size=6, max_size=6),
    st.sampled_from(sorted(TIERS)),
    st.tuples(counts, counts, counts, counts, counts),
    st.floats(0, 1e4),
    st.tuples(counts, counts, counts, counts),
    st.floats(0, 1e4),
)
def test_a_quote_is_never_less_than_the_charge(
    money: list[Decimal],
    tier: str,
    used: tuple[int, int, int, int, int],
    device_s: float,
    more: tuple[int, int, int, int],
    more_s: float,
) -> None:
    names = ("prompt", "cached_prompt", "output", "hook_in", "hook_out", "device")
    rate = Rate(
        model="*",
        site="*",
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        **{f"{name}_usu": price for name, price in zip(names, money, strict=True)},
    )
    prompt, cached, output, bytes_in, bytes_out = used
    usage = Usage(
        prompt_tokens=prompt,
        cached_prompt_tokens=cached,
        output_tokens=output,
        hook_bytes_in=bytes_in,
        hook_bytes_out=bytes_out,
    )
    most = max_charge_usu(
        rate,
        tier,
        prompt + more[0],
        output + more[1],
        hook_bytes_in=bytes_in + more[2],
        hook_bytes_out=bytes_out + more[3],
        device_s=device_s + more_s,
    )
    assert charge_usu(rate, tier, usage, device_s=device_s) <= most


def test_a_charge_is_the_usage_at_its_rates() -> None:
    rate = Rate(
        model="*",
        site="*",
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        prompt_usu=Decimal(1),
        cached_prompt_usu=Decimal(0),
        output_usu=Decimal(2),
        hook_in_usu=Decimal("0.001"),
        hook_out_usu=Decimal("0.01"),
        device_usu=Decimal(1000),
    )
    usage = Usage(
        prompt_tokens=5, output_tokens=3, hook_bytes_in=2000, hook_bytes_out=500, device_s=0.25
    )
    # 5 + 6 + 2 + 5 + 250; of a query the seconds are not priced.
    assert charge_usu(rate, "standard", usage, device_s=usage.device_s) == 268
    assert charge_usu(rate, "batch", usage, device_s=usage.device_s) == 134
    assert charge_usu(rate, "standard", usage) == 18
