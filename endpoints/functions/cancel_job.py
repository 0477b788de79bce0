def cancel_job(
    launch: dict[str, object], instance: str, job_id: str | None, run_dir: str = "~/.fabric"
) -> dict[str, object]:
    """End the job of an instance."""
    from fabric.launch.jobs import onlogin

    return onlogin.cancel_job(launch, instance, job_id, run_dir)
