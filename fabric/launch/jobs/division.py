"""How the processes of a job hold its model together, and how many of them each node has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fabric.errors import LaunchImpossible
from fabric.launch.jobs.order import Order
from fabric.messages import EngineOptions
from fabric.planning import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A model over the nodes of a job.

    Args:
        options: How the engine is sized, with what divides the model.
        ranks: Processes on each node, the first node first.
    """

    options: EngineOptions
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        options = self.options
        if sum(self.ranks) == 1:
            return "1"
        each = " + ".join(map(str, self.ranks))
        split = f"{options.tensor_parallel} tensor x {options.pipeline_parallel} pipeline"
        return f"{split}; by node {each}" if len(self.ranks) > 1 else split


def get_division(order: Order, plan: Plan | None) -> Division:
    """Return how an order's model is divided: as it says, as planned, or a stage for each node.

    Stages exchange the least, so they are what is put on different nodes where nothing is known.

    Args:
        order: What is asked for.
        plan: How the model fits the devices of the nodes, if they have any that are known.

    Raises:
        LaunchImpossible: Some nodes would have nothing to do.
    """
    options = order.options
    if get_num_ranks(options) > 1:
        return Division(options=options, ranks=_spread(get_num_ranks(options), order))
    if plan is not None and plan.split.num_ranks > 1:
        return _follow(plan, order)
    staged = options.model_copy(update={"pipeline_parallel": order.nodes})
    return Division(options=staged, ranks=(1,) * order.nodes)


def get_num_ranks(options: EngineOptions) -> int:
    """Return how many processes hold a model together."""
    return options.tensor_parallel * options.pipeline_parallel


def _follow(plan: Plan, order: Order) -> Division:
    if plan.num_nodes < order.nodes:
        reason = (
            f"{plan.shape.name} takes {plan.num_nodes} of them; ask for --nodes {plan.num_nodes},"
            " and --replicas for more copies"
        )
        raise LaunchImpossible(param="nodes", value=order.nodes, reason=reason)
    asked = order.options.model_dump(exclude_none=True)
    planned = plan.engine_options | {
        name: asked[name] for name in ("cache_bytes", "stage_layers") if name in asked
    }
    by_node = Counter(plan.node_of(rank) for rank in plan.ranks)
    return Division(
        options=EngineOptions.model_validate(asked | planned),
        ranks=tuple(by_node[node] for node in range(plan.num_nodes)),
    )


def _spread(num_ranks: int, order: Order) -> tuple[int, ...]:
    """Return how many of a number of ranks each node has, as even as can be."""
    if num_ranks < order.nodes:
        reason = (
            f"the model is divided among {num_ranks} processes; ask for --nodes {num_ranks}, or for"
            f" --pipeline-parallel {order.nodes}"
        )
        raise LaunchImpossible(param="nodes", value=order.nodes, reason=reason)
    each, more = divmod(num_ranks, order.nodes)
    return tuple(each + (node < more) for node in range(order.nodes))
