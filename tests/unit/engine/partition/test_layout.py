"""Layers, heads and widths go to ranks whole, each to somebody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.engine.attention import Chunk
from fabric.engine.partition.layout import Heads, Layout
from fabric.engine.partition.orders import read_chunks, write_chunks
from fabric.errors import ModelNotLoadable
from fabric.messages import EngineOptions
from fabric.planning import find_shape, get_plan
from fabric.planning.devices import DEVICES

COUNTS = st.integers(1, 12)


def layout_of(tensor: int, pipeline: int = 1, num_layers: int = 12) -> Layout:
    return Layout.of(num_layers, tensor=tensor, pipeline=pipeline, stage_layers=None, name="tiny")


@given(num_layers=COUNTS, tensor=COUNTS, pipeline=COUNTS)
def test_every_layer_is_in_one_stage_and_every_rank_has_a_place(num_layers, tensor, pipeline):
    if pipeline > num_layers:
        with pytest.raises(ModelNotLoadable, match=f"pipeline_parallel to at most {num_layers}"):
            layout_of(tensor, pipeline, num_layers)
        return
    layout = layout_of(tensor, pipeline, num_layers)
    assert [layer for stage in layout.stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in layout.stages]
    assert max(sizes) - min(sizes) <= 1
    places = [layout.place(rank) for rank in range(layout.num_ranks)]
    assert [rank for first in places[::tensor] for rank in first.group] == list(range(len(places)))
    assert sum(place.is_last for place in places) == tensor


@given(ranks=COUNTS, num_key_value=COUNTS, per_group=COUNTS)
def test_every_query_head_is_on_one_rank_with_the_key_value_head_it_needs(
    ranks, num_key_value, per_group
):
    num_query = num_key_value * per_group
    layout = layout_of(ranks)

    def heads_of(rank: int) -> Heads:
        place = layout.place(rank)
        return Heads.of(place, num_query=num_query, num_key_value=num_key_value, name="tiny")

    if -(-ranks // num_key_value) > per_group:  # one would have no query
        for rank in range(ranks):
            with pytest.raises(ModelNotLoadable, match="pipeline_parallel"):
                heads_of(rank)
        return
    heads = [heads_of(rank) for rank in range(ranks)]
    assert [head for own in heads for head in own.query] == list(range(num_query))
    for own in heads:
        assert len(own.query) > 0
        # Attention lets the same number of queries share each key-value head that is here.
        shared, rest = divmod(len(own.query), len(own.key_value))
        assert rest == 0
        for index, query in enumerate(own.query):
            assert own.key_value[index // shared] == query // per_group


@given(total=st.integers(1, 5000), ranks=COUNTS)
def test_widths_are_divided_without_gaps(total, ranks):
    columns = [layout_of(ranks).place(rank).width(total) for rank in range(ranks)]
    assert [column for own in columns for column in own] == list(range(total))


@pytest.mark.parametrize("stage_layers", [(5, 6), (12,), (4, 4, 4), (13, -1)])
def test_stages_that_do_not_sum_to_the_layers_are_refused(stage_layers):
    with pytest.raises(ModelNotLoadable, match="stage_layers"):
        Layout.of(12, tensor=1, pipeline=2, stage_layers=stage_layers, name="tiny")


CHUNKS = st.lists(
    st.builds(
        Chunk,
        tokens=st.lists(st.integers(0, 2**31), min_size=1, max_size=40),
        start=st.integers(0, 100),
        blocks=st.just(list(range(3, 12))),
        num_wanted=st.integers(0, 3),
    ),
    max_size=5,
)


@given(chunks=CHUNKS)
def test_chunks_arrive_as_they_were_sent(chunks):
    for sent, got in zip(chunks, read_chunks(write_chunks(chunks)), strict=True):
        assert (got.tokens, got.start, got.num_wanted) == (sent.tokens, sent.start, sent.num_wanted)
        needed = -(-(sent.start + len(sent.tokens)) // 16)
        assert got.blocks == sent.blocks[:needed]


@pytest.mark.parametrize(
    ("model", "device", "num_nodes"),
    [
        ("llama-3.1-70b", "A100-80", 1),
        ("llama-3.1-405b", "H200", 1),
        ("mixtral-8x22b", "H200", 1),
    ],
)
def test_the_split_that_a_plan_chooses_is_one_the_engine_takes(model, device, num_nodes):
    shape = find_shape(model)
    plan = get_plan(shape, DEVICES[device], num_nodes=num_nodes)
    split = plan.split
    assert split.num_ranks > 1
    options = EngineOptions.model_validate(plan.engine_options)
    layout = Layout.of(
        len(shape.layers),
        tensor=options.tensor_parallel,
        pipeline=options.pipeline_parallel,
        stage_layers=options.stage_layers,
        name=model,
    )
    assert layout.stages == split.stages
    assert layout.num_ranks == split.num_ranks
