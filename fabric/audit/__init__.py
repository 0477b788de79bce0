"""What administrators changed: who, what, before, after and when, in a chain that shows tampering.

``recording`` writes an entry for every transaction that changes something; nobody has to remember
to. ``AuditLog`` reads and verifies them.
"""

from fabric.audit.log import AuditEntry, AuditLog
from fabric.audit.recorder import recording

__all__ = ["AuditEntry", "AuditLog", "recording"]
