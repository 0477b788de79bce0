"""``completion``: what makes a shell complete nouns, verbs and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete this program's commands and options.

    \b
    Examples, for the files that each shell reads when it starts:
      eval "$(fabric-admin completion bash)"                       ~/.bashrc
      eval "$(fabric-admin completion zsh)"                        ~/.zshrc
      fabric-admin completion fish | source      ~/.config/fish/config.fish
    """
    root = ctx.find_root()
    program = str(root.info_name)
    variable = f"_{program}_COMPLETE".replace("-", "_").upper()
    cls = get_completion_class(shell)
    assert cls is not None
    click.echo(cls(root.command, {}, program, variable).source())
