"""Intervention programs without a model: checked against its points, bounded and priced."""

from fabric.programs.caps import CAPS, ProgramCaps
from fabric.programs.check import check
from fabric.programs.checked import LANES, Checked, CheckedNode, CheckedRun, Scope, dearest
from fabric.programs.constants import (
    DTYPES,
    ITEM_BYTES,
    TensorSpec,
    read_constants,
    read_header,
    verify_constants,
)
from fabric.programs.model_ops import is_transposed
from fabric.programs.points import canonical, layer_of, order_of, resolve
from fabric.programs.references import references
from fabric.programs.schema import json_schema

__all__ = [
    "CAPS",
    "DTYPES",
    "ITEM_BYTES",
    "LANES",
    "Checked",
    "CheckedNode",
    "CheckedRun",
    "ProgramCaps",
    "Scope",
    "TensorSpec",
    "canonical",
    "check",
    "dearest",
    "is_transposed",
    "json_schema",
    "layer_of",
    "order_of",
    "read_constants",
    "read_header",
    "references",
    "resolve",
    "verify_constants",
]
