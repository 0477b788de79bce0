def replicate_version(manifest: dict[str, object], run_dir: str = "~/.fabric") -> dict[str, object]:
    """Bring the files of a model version to this site and check them against their digests."""
    from fabric.launch import onsite

    return onsite.replicate_version(manifest, run_dir)
