"""The broker: admits requests, chooses where they run, and sees each one to its single end.

``select`` and ``state`` are pure; ``admit`` and ``loop`` do the I/O.
"""

from fabric.broker.limits import Standing
from fabric.broker.loop import Broker
from fabric.broker.observe import Observer
from fabric.broker.replicas import ReplicaView
from fabric.broker.run import Run
from fabric.broker.settings import BrokerSettings

__all__ = ["Broker", "BrokerSettings", "Observer", "ReplicaView", "Run", "Standing"]
