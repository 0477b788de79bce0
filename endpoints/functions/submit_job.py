def submit_job(
    launch: dict[str, object], spec: dict[str, object] | None, run_dir: str = "~/.fabric"
) -> dict[str, object]:
    """Submit a job that runs an instance, from this login node; without a spec, show its script."""
    from fabric.launch.jobs import onlogin

    return onlogin.submit_job(launch, spec, run_dir)
