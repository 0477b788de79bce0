def poll_jobs(
    launch: dict[str, object], jobs: dict[str, str], run_dir: str = "~/.fabric"
) -> dict[str, object]:
    """Say how the jobs of a launch are, and their instances."""
    from fabric.launch.jobs import onlogin

    return onlogin.poll_jobs(launch, jobs, run_dir)
