"""How commands end: one sentence on standard error, and a code that scripts can rely on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click

from fabric import errors

logger = logging.getLogger(__name__)

FORMAT = "fabric.cli.format"
"""Where the chosen output format is kept in the root context's ``meta``."""


class Exit(IntEnum):
    """The exit codes."""

    OK = 0
    INTERNAL = 1
    """A defect, of the fabric or of what it runs on."""
    USAGE = 2
    """The command line was not understood."""
    REFUSED = 3
    """The request, a setting or an account does not allow it."""
    AUTH = 4
    """The key is missing, not valid, or may not do this."""
    UNAVAILABLE = 5
    """The hub, a site or a model cannot be reached, or broke off."""
    INTERRUPTED = 130
    """Ctrl-C."""


EPILOG = """\b
Exit codes:
  0    done
  1    internal error; of doctor: something is wrong
  2    the command line was not understood
  3    refused: the request, a setting or an account does not allow it
  4    the API key is missing, not valid, or may not do this
  5    the hub, a site or a model cannot be reached, or broke off
  130  interrupted
"""

_CODES: tuple[tuple[type[errors.FabricError], Exit], ...] = (
    (errors.RequestCancelled, Exit.INTERRUPTED),
    (errors.NotFound, Exit.REFUSED),
    (errors.AuthUnavailable, Exit.UNAVAILABLE),
    (errors.AuthError, Exit.AUTH),
    (errors.PlacementError, Exit.UNAVAILABLE),
    (errors.DispatchError, Exit.UNAVAILABLE),
    (errors.LaunchError, Exit.UNAVAILABLE),
    (errors.EngineStopped, Exit.UNAVAILABLE),
    (errors.ConfigError, Exit.REFUSED),
)


def exit_code(error: errors.FabricError) -> Exit:
    """Return the code a command ends with."""
    for family, code in _CODES:
        if isinstance(error, family):
            return code
    return Exit.REFUSED if 400 <= error.http_status < 500 else Exit.INTERNAL


@contextmanager
def reported(ctx: click.Context) -> Iterator[None]:
    """Report what ends the block as one sentence, and exit with its code."""
    try:
        yield
    except errors.FabricError as error:
        logger.debug("The command failed.", exc_info=True)
        _report(ctx, error)
        ctx.exit(exit_code(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nInterrupted.", err=True)
        ctx.exit(Exit.INTERRUPTED)
    except (click.ClickException, click.exceptions.Exit, OSError):
        # Click reports these itself, closed pipes included.
        raise
    except Exception as error:
        logger.debug("The command failed.", exc_info=True)
        sentence = f"This is a defect: {type(error).__name__}: {error}. Run it again with -vv."
        _report(ctx, errors.FabricError(sentence))
        ctx.exit(Exit.INTERNAL)


def _report(ctx: click.Context, error: errors.FabricError) -> None:
    if ctx.find_root().meta.get(FORMAT) == "json":
        body = {"code": error.code, "message": error.message, "detail": error.detail}
        click.echo(json.dumps({"error": body}, default=str), err=True)
    else:
        click.echo(click.style("Error: ", fg="red", bold=True) + error.message, err=True)
