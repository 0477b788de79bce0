def infer(batch: dict[str, object], run_dir: str = "~/.fabric") -> dict[str, object]:
    """Run a batch of requests at once on an instance of this site, and return all they yield."""
    from fabric.launch import delivery

    return delivery.infer(batch, run_dir)
