"""``python -m fabric.cli`` is ``fabric``."""

from fabric.cli.main import fabric

fabric(prog_name="fabric")
