def run_program(program: dict[str, object], run_dir: str = "~/.fabric") -> dict[str, object]:
    """Run an intervention program on an instance of this site.

    The program is delivered as it is, like a task of ``infer``; whether its mode is supported is
    the instance's to say, and its refusal comes back as the program's failure.
    """
    from fabric.launch import delivery

    return delivery.run_program(program, run_dir)
