"""What the stand-in remembers of endpoints, functions and tasks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue

Json = dict[str, JsonValue]
# A heartbeat that is later than this many periods means that its endpoint is gone.
MISSED_HEARTBEATS = 2.5


class Record(BaseModel):
    """One row, by its id."""

    model_config = ConfigDict(frozen=True)

    id: str


class Endpoint(Record):
    """An endpoint someone registered: its core agent."""

    owner: str
    registration: Json
    secret: str
    locked_until: float = 0.0

    @property
    def allowed_functions(self) -> list[str] | None:
        """The only functions it runs; ``None`` when it runs any."""
        allowed = self.registration.get("allowed_functions")
        return [str(one) for one in allowed] if isinstance(allowed, list) else None

    @property
    def multi_user(self) -> bool:
        """Whether others than its owner may ask it for tasks."""
        return bool(self.registration.get("multi_user"))


class UserEndpoint(Record):
    """What a core agent starts for one identity, config and runtime."""

    parent: str
    identities: list[Json]
    options: Json
    runtime: Json
    secret: str


class Function(Record):
    """A registered function."""

    owner: str
    registration: Json

    @property
    def code(self) -> str:
        """The function as a worker unpacks it."""
        code = str(self.registration["function_code"])
        if self.registration.get("serialized", True):
            return code
        body = f"st\n{self.registration['function_name']}:{code}"
        return f"{len(body)}\n{body}"

    @property
    def public(self) -> bool:
        """Whether everybody may call it."""
        return bool(self.registration.get("public"))

    @property
    def group(self) -> str | None:
        """The Globus group whose members may call it."""
        group = self.registration.get("group")
        return str(group) if group else None


class Task(Record):
    """A task and, in the end, its result: ``outcome`` holds what the user is told of it."""

    group: str
    owner: str
    endpoint: str
    created_at: str
    queued: bool
    outcome: Json | None = None

    def to_document(self) -> Json:
        """Return it as the service's routes show it."""
        return {"task_id": self.id, "status": "waiting-for-ep"} | (self.outcome or {})


class Report(Record):
    """The last heartbeat of an endpoint, at ``at`` seconds of the clock."""

    at: float
    state: Json

    def online(self, now: float) -> bool:
        """Whether the endpoint is there at ``now``."""
        period = self.state.get("heartbeat_period", 30.0)
        assert isinstance(period, int | float)
        active = period > 0 and self.state.get("active", True)
        return bool(active) and now - self.at < MISSED_HEARTBEATS * period


class ResultReader(Record):
    """The broker account that a user reads results with; the id is the identity."""

    secret: str


class RequestLog(Record):
    """One answered HTTP request."""

    at: float
    user: str
    method: str
    path: str
    status: int
