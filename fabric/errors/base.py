"""The root of the taxonomy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class FabricError(Exception):
    """Root of the taxonomy.

    Args:
        message: What happened, to which value, and what to do about it.
        **detail: The values as JSON-safe fields.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    _by_code: ClassVar[dict[str, type[FabricError]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        FabricError._by_code[cls.code] = cls

    def __init__(self, message: str, /, **detail: object) -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, object] = detail

    def __reduce__(self) -> tuple[object, ...]:
        # Workflow systems pickle errors, and a subclass's constructor arguments are not kept.
        return FabricError.rebuild, (self.code, self.message, self.detail)

    @staticmethod
    def rebuild(code: str, message: str, detail: Mapping[str, object]) -> FabricError:
        """Return the error a peer reported; an unknown code becomes a plain ``FabricError``."""
        cls = FabricError._by_code.get(code, FabricError)
        error = cls.__new__(cls)
        FabricError.__init__(error, message, **dict(detail))
        return error
