"""The wire: frozen models of everything that crosses a process.

``request`` is what a user asks, ``task`` what one attempt carries to an instance, ``events`` what
comes back, ``session`` the frames around them, ``run`` what the hub tells its client, ``lifecycle``
the states. All are JSON; unknown fields are refused.
"""

from fabric.messages.constraint import Choices, Constraint, JsonSchema, Regex
from fabric.messages.events import (
    Accepted,
    Event,
    Failed,
    Failure,
    Finished,
    PromptScored,
    ScoredToken,
    Token,
    TopLogprob,
    Usage,
)
from fabric.messages.launch import EngineOptions, InstanceSpec, InstanceStatus, Launch, Reach
from fabric.messages.lifecycle import InstanceState, RunState
from fabric.messages.request import (
    ChatInput,
    ChatMessage,
    ModelRef,
    Request,
    Sampling,
    TextInput,
    TokensInput,
    new_id,
)
from fabric.messages.run import Candidate, Placed, Placement, RunCompleted, RunEvent, RunFailed
from fabric.messages.session import (
    Cancel,
    Credit,
    Drain,
    FromHub,
    FromInstance,
    Goodbye,
    Heartbeat,
    Hello,
    Limits,
    Load,
    Metered,
    Redeem,
    Redeemed,
    Settled,
    Welcome,
    parse_from_hub,
    parse_from_instance,
)
from fabric.messages.task import Task

__all__ = [
    "Accepted",
    "Cancel",
    "Candidate",
    "ChatInput",
    "ChatMessage",
    "Choices",
    "Constraint",
    "Credit",
    "Drain",
    "EngineOptions",
    "Event",
    "Failed",
    "Failure",
    "Finished",
    "FromHub",
    "FromInstance",
    "Goodbye",
    "Heartbeat",
    "Hello",
    "InstanceSpec",
    "InstanceState",
    "InstanceStatus",
    "JsonSchema",
    "Launch",
    "Limits",
    "Load",
    "Metered",
    "ModelRef",
    "Placed",
    "Placement",
    "PromptScored",
    "Reach",
    "Redeem",
    "Redeemed",
    "Regex",
    "Request",
    "RunCompleted",
    "RunEvent",
    "RunFailed",
    "RunState",
    "Sampling",
    "ScoredToken",
    "Settled",
    "Task",
    "TextInput",
    "Token",
    "TokensInput",
    "TopLogprob",
    "Usage",
    "Welcome",
    "new_id",
    "parse_from_hub",
    "parse_from_instance",
]
