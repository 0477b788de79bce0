def read_job_logs(
    launch: dict[str, object], instance: str, run_dir: str = "~/.fabric"
) -> dict[str, object]:
    """Return the ends of what an instance and its job have written."""
    from fabric.launch.jobs import onlogin

    return onlogin.read_job_logs(launch, instance, run_dir)
