"""Holds an order against what is known of a machine's queues."""

from __future__ import annotations

from fabric.config.endpoint import to_seconds
from fabric.config.system import Queue, System
from fabric.errors import LaunchImpossible
from fabric.launch.jobs.order import Order


def choose_queue(order: Order, system: System) -> tuple[str | None, Queue | None]:
    """Return the queue of an order: the one it names, the machine's default, or its only one.

    Raises:
        LaunchImpossible: There is no such queue, it is closed, or none is named and none is the
            default.
    """
    queues = system.queues
    if order.queue is None:
        if not queues:
            return None, None
        chosen = [name for name, queue in queues.items() if queue.default] or list(queues)
        if len(chosen) > 1:
            raise LaunchImpossible(
                param="queue", value=None, reason=f"name one of {', '.join(chosen)}"
            )
        return chosen[0], queues[chosen[0]]
    if queues and order.queue not in queues:
        reason = f"{order.machine} has the queues {', '.join(queues)}"
        raise LaunchImpossible(param="queue", value=order.queue, reason=reason)
    queue = queues.get(order.queue)
    if queue is not None and not queue.available:
        reason = f"it takes no jobs now{f' ({queue.note})' if queue.note else ''}"
        raise LaunchImpossible(param="queue", value=order.queue, reason=reason)
    return order.queue, queue


def check_limits(order: Order, name: str, queue: Queue) -> None:
    """Refuse an order that the queue would refuse, or keep waiting for ever.

    Raises:
        LaunchImpossible: Nodes, walltime or the number of jobs are outside its limits.
    """
    nodes = order.nodes
    if nodes < (queue.min_nodes or 1):
        reason = f"{name} takes jobs of at least {queue.min_nodes} nodes"
        raise LaunchImpossible(param="nodes", value=nodes, reason=reason)
    if queue.max_nodes is not None and nodes > queue.max_nodes:
        reason = f"{name} takes jobs of at most {queue.max_nodes} nodes"
        raise LaunchImpossible(param="nodes", value=nodes, reason=reason)
    if queue.max_nodes_per_user is not None and nodes * order.replicas > queue.max_nodes_per_user:
        reason = f"{name} gives a user at most {queue.max_nodes_per_user} nodes at once"
        raise LaunchImpossible(param="replicas", value=order.replicas, reason=reason)
    longest = queue.get_max_walltime(nodes)
    if longest is not None and order.walltime_s > to_seconds(longest):
        of_nodes = "1 node" if nodes == 1 else f"{nodes} nodes"
        reason = f"{name} lets a job of {of_nodes} run for {longest} at most"
        if order.keep_until is None:
            reason += "; with --keep-alive-until one job follows another"
        raise LaunchImpossible(param="walltime", value=order.walltime, reason=reason)
    shortest = queue.min_walltime
    if shortest is not None and order.walltime_s < to_seconds(shortest):
        reason = f"{name} wants jobs of at least {shortest}"
        raise LaunchImpossible(param="walltime", value=order.walltime, reason=reason)
    # While one job is handed over to the next, a replica has two.
    jobs = order.replicas * (1 if order.keep_until is None else 2)
    for limit in (queue.max_running_per_user, queue.max_submitted_per_user):
        if limit is not None and jobs > limit:
            reason = f"{name} lets a user have {limit} jobs, and {jobs} would be needed at once"
            raise LaunchImpossible(param="replicas", value=order.replicas, reason=reason)
