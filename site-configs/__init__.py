"""Site files that ship with the package; read them with ``fabric.config.shipped_sites``."""
