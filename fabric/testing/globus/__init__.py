"""The Globus rig: a stand-in of the hosted service, real RabbitMQ, real endpoint agents, users.

The SDK and the endpoint agent that talk to it are the unmodified ones::

    with running_globus(directory) as globus, globus.endpoint("here", owner="alice") as endpoint:
        client = globus.client("alice")
        with Executor(endpoint.id, client=client) as executor:
            print(executor.submit(sum, [1, 2]).result())
"""

from fabric.testing.globus.endpoint import Endpoint
from fabric.testing.globus.rig import Globus, running_globus
from fabric.testing.globus.service.records import RequestLog
from fabric.testing.globus.service.settings import PublishedLimits
from fabric.testing.globus.users import User

__all__ = ["Endpoint", "Globus", "PublishedLimits", "RequestLog", "User", "running_globus"]
