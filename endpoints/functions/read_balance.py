def read_balance(
    site: dict[str, object], account: str, token: str | None = None, run_dir: str = "~/.fabric"
) -> dict[str, object]:
    """Say what an account has left at this centre."""
    from fabric.launch.jobs import onlogin

    return onlogin.read_balance(site, account, token, run_dir)
