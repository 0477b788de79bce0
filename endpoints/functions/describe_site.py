def describe_site(run_dir: str = "~/.fabric") -> dict[str, object]:
    """Say what machine a worker of this endpoint runs on, and which instances run there."""
    from fabric.launch import onsite

    return onsite.describe_site(run_dir)
