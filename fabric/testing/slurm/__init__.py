"""A real Slurm of one's own: controller, nodes and, if wanted, accounting on this machine."""

from fabric.testing.slurm.accounting import Accounting
from fabric.testing.slurm.rig import Slurm, running_slurm

__all__ = ["Accounting", "Slurm", "running_slurm"]
