"""A federation in simulated time: the hub's own broker over sites that are made up.

What decides is ``fabric.broker.state`` as the hub runs it, with its retries, ejections and
deadlines; a baseline replaces the choice alone. ``simulate(world, trace, policy)`` returns what
users and accounts would have noticed.
"""

from fabric.testing.simulation.baselines import BASELINES
from fabric.testing.simulation.federation import make_federation
from fabric.testing.simulation.report import Report
from fabric.testing.simulation.simulator import Simulator, simulate
from fabric.testing.simulation.traces import ARRIVALS, Arrival, iter_trace, make_trace
from fabric.testing.simulation.world import SiteSketch, World, make_world

__all__ = [
    "ARRIVALS",
    "BASELINES",
    "Arrival",
    "Report",
    "Simulator",
    "SiteSketch",
    "World",
    "iter_trace",
    "make_federation",
    "make_trace",
    "make_world",
    "simulate",
]
