"""The adapters of projects: LoRA files checked, kept by digest and found by name."""

from fabric.adapters.adapters import Adapters
from fabric.adapters.records import AdapterRecord, AdapterSettings

__all__ = ["AdapterRecord", "AdapterSettings", "Adapters"]
