def stop_instance(instance: str, run_dir: str = "~/.fabric") -> dict[str, object]:
    """Ask an instance of this site to finish its tasks and leave."""
    from fabric.launch import onsite

    return onsite.stop_instance(instance, run_dir)
