"""``python -m fabric.cli.admin`` is ``fabric-admin``."""

from fabric.cli.main import fabric_admin

fabric_admin(prog_name="fabric-admin")
