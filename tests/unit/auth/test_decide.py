"""The one decision about access, compared with what its rules say in words."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.auth import ANY, MODES, TIERS, Decision, Grant, Identity, Permits, Rules, get_modes
from fabric.cli.admin import grant as command
from fabric.messages import EMBED_SAMPLING, Request, TextInput

OPEN, SECRET = "open", "secret"
MINE = Grant(id="1", subject="project:astro", model=SECRET, site=None)


def permits(*grants: Grant, sites: frozenset[str] = frozenset()) -> Permits:
    models = frozenset({SECRET})
    return Permits(project="astro", key_id="k", models=models, sites=sites, grants=grants)


def test_what_is_public_is_everybodys() -> None:
    assert permits().decide(model=OPEN, site="alpha", modes=MODES, tier="interactive") == "allowed"


def test_what_is_private_is_not_there_for_others() -> None:
    assert permits().decide(model=SECRET, modes=["query"]) is Decision.HIDDEN
    closed = permits(sites=frozenset({"alpha"}))
    assert closed.decide(model=OPEN, site="alpha", modes=["query"]) is Decision.HIDDEN
    assert closed.decide(model=OPEN, site="beta", modes=["query"]) is Decision.ALLOWED


def test_a_grant_is_for_its_modes_and_tiers() -> None:
    some = replace(MINE, modes=frozenset({"query"}), tiers=frozenset({"batch"}))
    asked = permits(some)
    assert asked.decide(model=SECRET, site="a", modes=["query"], tier="batch") == "allowed"
    assert asked.decide(model=SECRET, site="a", modes=["query"], tier="standard") == "refused"
    assert asked.decide(model=SECRET, site="a", modes=["query", "read"], tier="batch") == "refused"
    other = replace(MINE, id="2", modes=frozenset({"read"}))
    both = permits(some, other)
    assert both.decide(model=SECRET, site="a", modes=["query", "read"], tier="batch") == "allowed"


def test_a_grant_at_a_site_is_for_that_site() -> None:
    there = permits(replace(MINE, site="alpha"))
    assert there.decide(model=SECRET, site="alpha", modes=["query"]) is Decision.ALLOWED
    assert there.decide(model=SECRET, site="beta", modes=["query"]) is Decision.REFUSED


def test_a_grant_of_a_site_opens_no_private_model() -> None:
    closed = frozenset({"alpha"})
    of_site = replace(MINE, model=None, site="alpha")
    assert permits(of_site, sites=closed).decide(model=SECRET, modes=["query"]) == "hidden"
    assert permits(of_site, sites=closed).decide(model=OPEN, site="alpha", modes=["query"]) == (
        "allowed"
    )
    of_both = replace(MINE, site="alpha")
    assert permits(of_both, sites=closed).decide(model=SECRET, site="alpha", modes=["query"]) == (
        "allowed"
    )
    # The grant of a model at a private site is no grant of the site with other models.
    assert permits(of_both, sites=closed).decide(model=OPEN, site="alpha", modes=["query"]) == (
        "refused"
    )


names = st.sampled_from([None, ANY, "m1", "m2"])
places = st.sampled_from([None, ANY, "s1", "s2"])
some = st.frozensets(st.sampled_from(["query", "read"]), min_size=1)
tiers = st.frozensets(st.sampled_from(["standard", "batch"]), min_size=1)
grants = st.lists(
    st.builds(
        Grant,
        id=st.just("g"),
        subject=st.just("*"),
        model=names,
        site=places,
        modes=some,
        tiers=tiers,
    ).filter(lambda grant: (grant.model, grant.site) != (None, None)),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    grants,
    st.frozensets(st.sampled_from(["m1", "m2"])),
    st.frozensets(st.just("s1")),
    st.none() | st.frozensets(st.sampled_from(["s1", "s2"])),
)
def test_decisions_are_those_of_the_rules_in_words(
    given_grants: list[Grant],
    models: frozenset[str],
    sites: frozenset[str],
    homes: frozenset[str] | None,
) -> None:
    caller = Permits(
        project="p", key_id="k", models=models, sites=sites, grants=tuple(given_grants), homes=homes
    )
    for model, site, mode, tier in product(
        ("m1", "m2"), ("s1", "s2"), ("query", "read"), ("standard", "batch")
    ):
        sees_model = model not in models or any(g.model in (model, "*") for g in given_grants)
        sees_site = site not in sites or any(g.site in (site, "*") for g in given_grants)
        fit = [g for g in given_grants if mode in g.modes and tier in g.tiers]
        opens_model = any(g.model in (model, "*") and g.site in (None, "*", site) for g in fit)
        opens_site = any(g.site in (site, "*") and g.model in (None, "*", model) for g in fit)
        expected = Decision.ALLOWED
        if (model in models and not opens_model) or (site in sites and not opens_site):
            expected = Decision.REFUSED
        if homes is not None and site not in homes:
            expected = Decision.REFUSED
        if not (sees_model and sees_site):
            expected = Decision.HIDDEN
        found = caller.decide(model=model, site=site, modes=[mode], tier=tier)
        assert found is expected, (given_grants, model, site, mode, tier)


def test_grants_are_found_by_who_the_caller_is() -> None:
    login = Identity(
        key_id="globus:0000-1111",
        project="astro",
        scopes=frozenset(),
        max_concurrent=1,
        user="Alice@Example.edu",
        groups=frozenset({"g1"}),
    )
    key = Identity(key_id="abc", project="astro", scopes=frozenset(), max_concurrent=1)
    assert login.subjects == (
        *("*", "project:astro", "user:0000-1111", "user:alice@example.edu"),
        "group:g1",
    )
    assert key.subjects == ("*", "project:astro", "key:abc")
    by_subject = {
        subject: (replace(MINE, id=subject, subject=subject),)
        for subject in ("*", "project:astro", "project:bio", "key:abc", "group:g1")
    }
    rules = Rules(models=frozenset({SECRET}), grants=by_subject)
    assert [g.id for g in rules.permits(key).grants] == ["*", "project:astro", "key:abc"]
    assert [g.id for g in rules.permits(login).grants] == ["*", "project:astro", "group:g1"]


def test_a_site_runs_a_private_model_only_where_somebody_may_use_it() -> None:
    rules = Rules(
        models=frozenset({SECRET}), grants={"project:astro": (replace(MINE, site="alpha"),)}
    )
    assert rules.serves(SECRET, "alpha")
    assert not rules.serves(SECRET, "beta")
    assert rules.serves(OPEN, "beta")


def test_modes_are_those_that_requests_take() -> None:
    text = TextInput(text="x")
    assert get_modes(Request(model="m", input=text)) == {"query"}
    embed = Request(model="m", input=text, mode="embed", sampling=EMBED_SAMPLING)
    assert get_modes(embed) == {"embed"}
    program = embed.model_copy(update={"mode": "program"})
    assert get_modes(program, {"program:gradient"}) == {"read", "gradient"}


def test_the_command_line_knows_the_same_modes_and_tiers() -> None:
    assert command.MODES == MODES
    assert command.TIERS == TIERS
