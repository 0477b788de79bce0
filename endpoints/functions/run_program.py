def run_program(program: dict[str, object], run_dir: str = "~/.fabric") -> dict[str, object]:
    """Run an intervention program on an instance of this site.

    It is ``{"model", "ticket", "program"}``, with ``tier`` and ``deadline_s`` if they matter; or a
    ``task`` of the hub's. The answer is as that of ``infer``: its one result has the program's
    ``runs`` with what they saved, or an ``error``.
    """
    from fabric.launch import delivery

    return delivery.run_program(program, run_dir)
