"""Artifacts: what programs are given and what they leave, kept for a while for one project.

Contents are files named by their SHA-256; who may read them, and until when, are rows.
"""

from fabric.artifacts.records import ArtifactRecord, ArtifactSettings
from fabric.artifacts.store import Artifacts

__all__ = ["ArtifactRecord", "ArtifactSettings", "Artifacts"]
