"""What can be kept in the catalog: names that a request can say, and sizes that fit a column."""

from __future__ import annotations

import re

from fabric.errors import RequestInvalid
from fabric.messages import MODEL_NAME, MODEL_VERSION, SITE_NAME

MAX_CONTEXT_TOKENS = 2**31 - 1


def check_site(name: str) -> None:
    """Check the name of a new site.

    Raises:
        RequestInvalid: No request could say it.
    """
    if not re.fullmatch(SITE_NAME, name):
        reason = "a name is 1 to 63 lower-case letters, digits and hyphens, no hyphen first"
        raise RequestInvalid(param="site", value=name, reason=reason)


def check_version(name: str, revision: str, digest: str | None) -> None:
    """Check what a new version of a model is called.

    Raises:
        RequestInvalid: No request could say it.
    """
    if not re.fullmatch(MODEL_NAME, name):
        reason = "a name is 1 to 128 letters, digits and '_./-'; a revision is given by itself"
        raise RequestInvalid(param="model", value=name, reason=reason)
    for param, value in (("revision", revision), ("digest", digest)):
        if value is not None and not re.fullmatch(MODEL_VERSION, value):
            reason = "it is 1 to 128 letters, digits and '_.:-'"
            raise RequestInvalid(param=param, value=value, reason=reason)


def check_context(num_tokens: int | None) -> None:
    """Check the length of a version's context, if one is given.

    Raises:
        RequestInvalid: It is not positive, or over ``MAX_CONTEXT_TOKENS``.
    """
    if num_tokens is not None and not 1 <= num_tokens <= MAX_CONTEXT_TOKENS:
        reason = f"it is from 1 to {MAX_CONTEXT_TOKENS} tokens"
        raise RequestInvalid(param="context_tokens", value=num_tokens, reason=reason)
