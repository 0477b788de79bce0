"""What a model needs of devices: memory, the split over ranks, and bounds on its speed.

Pure arithmetic over published figures: nothing is loaded, and nothing but ``here`` is measured.
"""

from fabric.planning.bounds import Bounds
from fabric.planning.devices import DEVICES, HERE, Device, find_device
from fabric.planning.families import shape_of
from fabric.planning.known_models import KNOWN_MODELS, known_shape
from fabric.planning.memory import RankMemory
from fabric.planning.model_shape import LayerShape, ModelShape
from fabric.planning.plan import (
    DEFAULT_BATCH,
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_STEP_TOKENS,
    Plan,
    get_plan,
)
from fabric.planning.source import find_shape
from fabric.planning.split import Machine, Split
from fabric.planning.workload import PRECISIONS, Workload

__all__ = [
    "DEFAULT_BATCH",
    "DEFAULT_CONTEXT_TOKENS",
    "DEFAULT_STEP_TOKENS",
    "DEVICES",
    "HERE",
    "KNOWN_MODELS",
    "PRECISIONS",
    "Bounds",
    "Device",
    "LayerShape",
    "Machine",
    "ModelShape",
    "Plan",
    "RankMemory",
    "Split",
    "Workload",
    "find_device",
    "find_shape",
    "get_plan",
    "known_shape",
    "shape_of",
]
