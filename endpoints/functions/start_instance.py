def start_instance(spec: dict[str, object], run_dir: str = "~/.fabric") -> dict[str, object]:
    """Run an instance on this worker, and return how it ended once it has."""
    from fabric.launch import onsite

    return onsite.start_instance(spec, run_dir)
