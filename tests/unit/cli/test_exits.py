"""Errors become sentences and exit codes."""

from __future__ import annotations

import json
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner

from fabric import errors
from fabric.cli.exits import FORMAT, Exit, exit_code, reported


def family(cls: type[errors.FabricError]) -> list[type[errors.FabricError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in family(child))]


@pytest.mark.parametrize("cls", family(errors.FabricError), ids=lambda cls: cls.code)
def test_every_error_of_the_taxonomy_has_a_fitting_code(cls: type[errors.FabricError]) -> None:
    code = exit_code(errors.FabricError.rebuild(cls.code, "A sentence.", {}))
    assert code in set(Exit) - {Exit.OK, Exit.USAGE}
    if cls.retryable:
        assert code in (Exit.UNAVAILABLE, Exit.REFUSED, Exit.INTERNAL)
    if cls.http_status in (401, 403):
        assert code is Exit.AUTH


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UnknownModel(model="x", known=[]), Exit.REFUSED),
        (errors.InsufficientBalance(account="a", needed_usu=2, available_usu=1), Exit.REFUSED),
        (errors.KeyInvalid(), Exit.AUTH),
        (errors.NotFound(kind="run", name="x"), Exit.REFUSED),
        (errors.HubUnreachable(url="u", reason="r"), Exit.UNAVAILABLE),
        (errors.NoReplica(model="m", reasons={}), Exit.UNAVAILABLE),
        (errors.RequestCancelled(), Exit.INTERRUPTED),
        (errors.FabricError("It broke."), Exit.INTERNAL),
    ],
)
def test_the_documented_codes(error: errors.FabricError, code: Exit) -> None:
    assert exit_code(error) is code


def failing(error: BaseException, *, as_json: bool = False) -> click.Command:
    @click.command()
    @click.pass_context
    def command(ctx: click.Context) -> NoReturn:
        ctx.find_root().meta[FORMAT] = "json" if as_json else "text"
        with reported(ctx):
            raise error
        raise AssertionError

    return command


def test_a_typed_error_is_one_sentence() -> None:
    done = CliRunner().invoke(failing(errors.KeyMissing()), [])
    assert done.exit_code == 4
    assert done.stderr == f"Error: {errors.KeyMissing().message}\n"
    assert done.stdout == ""


def test_with_json_errors_are_json() -> None:
    error = errors.UnknownModel(model="x", known=["toy"])
    done = CliRunner().invoke(failing(error, as_json=True), [])
    told = json.loads(done.stderr)["error"]
    assert (told["code"], told["detail"]["known"]) == ("model_not_found", ["toy"])


def test_a_defect_is_told_without_a_traceback() -> None:
    done = CliRunner().invoke(failing(ZeroDivisionError("division by zero")), [])
    assert done.exit_code == 1
    assert "ZeroDivisionError: division by zero. Run it again with -vv." in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_with_130() -> None:
    done = CliRunner().invoke(failing(KeyboardInterrupt()), [])
    assert done.exit_code == 130
    assert "Interrupted." in done.stderr
