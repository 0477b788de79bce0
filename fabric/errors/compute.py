"""Starting instances, and what goes wrong inside them: launch and engine."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.errors.base import FabricError


class LaunchError(FabricError):
    """An instance could not be started."""

    code = "launch_error"
    http_status = 503


class BlockFailed(LaunchError):
    """The block ended before or while its instance ran."""

    code = "block_failed"

    def __init__(self, *, site: str, reason: str, log_path: str = "") -> None:
        where = f" Its log is {log_path}." if log_path else ""
        super().__init__(
            f"The block at site {site!r} failed: {reason}.{where}",
            site=site,
            reason=reason,
            log_path=log_path,
        )


class CanaryFailed(LaunchError):
    """The instance loaded but did not generate its canary."""

    code = "canary_failed"

    def __init__(self, *, model: str, reason: str) -> None:
        super().__init__(
            f"The model {model!r} loaded but its canary failed: {reason}. The instance does not"
            " join the pool.",
            model=model,
            reason=reason,
        )


class AlreadyStarted(LaunchError):
    """An instance of this id was started at this site before."""

    code = "already_started"
    http_status = 409

    def __init__(self, *, instance: str, log_path: str) -> None:
        super().__init__(
            f"The instance {instance!r} was started at this site before, and an instance is started"
            f" once (its log is {log_path}); ask the hub for another launch.",
            instance=instance,
            log_path=log_path,
        )


class LaunchImpossible(LaunchError):
    """What a launch asks for cannot be had at that machine."""

    code = "launch_impossible"
    http_status = 400

    def __init__(self, *, param: str, value: object, reason: str) -> None:
        given = f"without a {param}" if value is None else f"with {param} {value!r}"
        super().__init__(
            f"The launch cannot be made {given}: {reason}.",
            param=param,
            value=value if isinstance(value, int | float | str | None) else str(value),
            reason=reason,
        )


class AllocationTooSmall(LaunchError):
    """A launch may take more than its account at the machine has left."""

    code = "allocation_too_small"
    http_status = 402

    def __init__(
        self, *, account: str, machine: str, available: float, charge: float, unit: str
    ) -> None:
        super().__init__(
            f"The account {account!r} at {machine} has {available:,.4g} {unit}s left and the launch"
            f" may take {charge:,.4g}; ask for less time, fewer nodes or replicas, name another"
            " account, or launch all the same with --force.",
            account=account,
            machine=machine,
            available=available,
            charge=charge,
            unit=unit,
        )


class JobRefused(LaunchError):
    """The scheduler did not take a job."""

    code = "job_refused"
    http_status = 502

    def __init__(self, *, machine: str, reason: str) -> None:
        super().__init__(
            f"The scheduler of {machine!r} did not take the job: {reason}. Look at the batch script"
            " with `fabric launch --dry-run`, and check the account, the queue and their limits.",
            machine=machine,
            reason=reason,
        )


class JobsFailing(LaunchError):
    """Jobs of a launch ended one after the other before they served; no more are submitted."""

    code = "jobs_failing"

    def __init__(self, *, launch: str, num_failures: int, reason: str, log_path: str) -> None:
        super().__init__(
            f"{num_failures} jobs of the launch {launch} ended in a row before they were ready, so"
            f" no more are submitted. The last: {reason}. Its log is {log_path}; mend what it says"
            " and launch again.",
            launch=launch,
            num_failures=num_failures,
            reason=reason,
            log_path=log_path,
        )


class NodeFailed(LaunchError):
    """What a job runs on one of its further nodes has ended, or does not begin."""

    code = "node_failed"

    def __init__(self, *, host: str, what: str, reason: str) -> None:
        super().__init__(
            f"The node {host} is lost to its job: {what} {reason}. The instance ends; look for what"
            " the node said in the instance's log.",
            host=host,
            what=what,
            reason=reason,
        )


class WeightsMissing(LaunchError):
    """A job's node has no files of the model it should load."""

    code = "weights_missing"
    http_status = 404

    def __init__(self, *, model: str, source: str, host: str, looked_in: Sequence[str]) -> None:
        also = f", nor is the model in {' or '.join(looked_in)}" if looked_in else ""
        super().__init__(
            f"The weights of {model} are not at {source!r} on the node {host}{also}. Put them where"
            " all nodes see them, and name that directory as `model_weights` in the machine's site"
            " file, or register the model with a source that is there.",
            model=model,
            source=source,
            host=host,
            looked_in=list(looked_in),
        )


class SchedulerFailed(LaunchError):
    """A site's scheduler did not say what it was asked: when a job would start, or how jobs are."""

    code = "scheduler_failed"

    def __init__(self, *, command: str, reason: str) -> None:
        super().__init__(
            f"`{command}` gave no answer: {reason}. Run it by hand on the site's login node, and"
            " check the partition, the account and the limits that the site's file names.",
            command=command,
            reason=reason,
        )


class BalanceUnavailable(LaunchError):
    """A centre does not tell what a project has left."""

    code = "balance_unavailable"
    http_status = 503
    retryable = True

    def __init__(self, *, command: str, reason: str, remedy: str) -> None:
        super().__init__(
            f"The balance is not known: asked by {command!r}, {reason}; {remedy}.",
            command=command,
            reason=reason,
            remedy=remedy,
        )


class EngineError(FabricError):
    """The model engine could not do its part."""

    code = "engine_error"


class ModelNotLoadable(EngineError):
    """The model's files are missing or of a kind that cannot be served."""

    code = "model_not_loadable"

    def __init__(self, *, model: str, reason: str) -> None:
        super().__init__(
            f"The model {model!r} cannot be loaded: {reason}.", model=model, reason=reason
        )


class RowFailed(EngineError):
    """One request's row failed; others go on."""

    code = "row_failed"

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The engine ended this request alone: {reason}. Other requests are not affected.",
            reason=reason,
        )


class BackendFailed(EngineError):
    """The server that computes for the instance did not do its part."""

    code = "backend_failed"
    http_status = 502
    retryable = True

    def __init__(self, *, backend: str, reason: str) -> None:
        super().__init__(
            f"The {backend} server behind the instance failed: {reason}. The request may be sent"
            " again; the instance's log has what the server said.",
            backend=backend,
            reason=reason,
        )


class ConstraintFailed(EngineError):
    """The answer could not be held any further to what the request says it must be."""

    code = "constraint_failed"
    http_status = 400

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The answer could not be held to its constraint: {reason}. Make the schema, the"
            " regular expression or the choices simpler.",
            reason=reason,
        )


class CacheExhausted(EngineError):
    """The request can never fit this instance's KV cache."""

    code = "cache_exhausted"
    http_status = 400

    def __init__(self, *, needed_tokens: int, cache_tokens: int) -> None:
        super().__init__(
            f"The request needs {needed_tokens} tokens of KV cache and the instance has"
            f" {cache_tokens}; ask for fewer tokens or choices.",
            needed_tokens=needed_tokens,
            cache_tokens=cache_tokens,
        )


class EngineStopped(EngineError):
    """The engine is draining or has ended and takes no new rows."""

    code = "engine_stopped"
    http_status = 503
    retryable = True

    def __init__(self, *, reason: str) -> None:
        super().__init__(
            f"The instance takes no new requests: {reason}. The request may be sent elsewhere.",
            reason=reason,
        )


class RankLost(EngineError):
    """One of the processes that hold a model together is gone or hangs."""

    code = "rank_lost"
    http_status = 503
    retryable = True

    def __init__(self, *, rank: int | None, num_ranks: int, reason: str) -> None:
        which = "A rank" if rank is None else f"Rank {rank}"
        super().__init__(
            f"{which} of the model's {num_ranks} processes is lost: {reason}. The instance ends;"
            " its requests may be sent elsewhere. If it happens again, look for what ended the"
            " process in the instance's log and in the node's (out of memory, most often).",
            rank=rank,
            num_ranks=num_ranks,
            reason=reason,
        )
