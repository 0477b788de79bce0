"""How a model is divided among the nodes of a job."""

from __future__ import annotations

import pytest

from fabric.errors import LaunchImpossible
from fabric.launch.jobs import Order
from fabric.launch.jobs.division import get_division
from fabric.planning import DEVICES, find_shape, get_plan


def order(nodes: int = 1, **options: object) -> Order:
    return Order.model_validate(
        {"model": "m@1", "machine": "here", "walltime": "00:30:00", "nodes": nodes}
        | {"options": options}
    )


def test_one_node_runs_one_process() -> None:
    division = get_division(order(), None)
    assert (division.ranks, str(division)) == ((1,), "1")
    assert division.options == order().options


def test_each_node_has_a_stage_where_nothing_is_known_or_asked() -> None:
    division = get_division(order(nodes=3), None)
    assert division.ranks == (1, 1, 1)
    assert (division.options.tensor_parallel, division.options.pipeline_parallel) == (1, 3)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "nodes", "ranks"),
    [(4, 1, 2, (2, 2)), (2, 3, 2, (3, 3)), (5, 1, 2, (3, 2)), (4, 1, 1, (4,))],
)
def test_ranks_that_are_asked_for_are_spread_evenly(
    tensor: int, pipeline: int, nodes: int, ranks: tuple[int, ...]
) -> None:
    asked = order(nodes, tensor_parallel=tensor, pipeline_parallel=pipeline)
    assert get_division(asked, None).ranks == ranks


def test_no_node_is_left_without_a_rank() -> None:
    with pytest.raises(LaunchImpossible, match="divided among 2 processes; ask for --nodes 2"):
        get_division(order(3, tensor_parallel=2), None)


def test_a_plan_over_devices_is_followed_rank_by_rank() -> None:
    shape = find_shape("Llama-3-70B")
    plan = get_plan(shape, DEVICES["A100-40"], num_nodes=2, devices_per_node=4)
    division = get_division(order(2, max_rows=4), plan)
    assert len(division.ranks) == 2
    assert sum(division.ranks) == plan.split.num_ranks
    # Tensor groups do not reach over nodes, and ranks are numbered group by group.
    assert all(count % plan.split.tensor == 0 for count in division.ranks)
    options = division.options
    assert (options.tensor_parallel, options.pipeline_parallel) == (
        plan.split.tensor,
        plan.split.pipeline,
    )
    assert sum(options.stage_layers or ()) == len(shape.layers)
    assert options.max_rows == 4


def test_nodes_that_a_plan_does_not_need_are_refused() -> None:
    plan = get_plan(find_shape("Llama-3-8B"), DEVICES["A100-40"], num_nodes=1, devices_per_node=1)
    assert get_division(order(), plan).ranks == (1,)
    divided = get_plan(find_shape("Llama-3-70B"), DEVICES["A100-80"], num_nodes=4)
    if divided.num_nodes < 4:
        with pytest.raises(LaunchImpossible, match=f"--nodes {divided.num_nodes}, and --replicas"):
            get_division(order(4), divided)
