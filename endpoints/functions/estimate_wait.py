def estimate_wait(scheduler: str, options: dict[str, object]) -> dict[str, object]:
    """Estimate the seconds a job with these options would wait for its block."""
    from fabric.launch import waits

    return waits.estimate_wait(scheduler, options)
