"""Plans that cannot be made."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.errors.admission import AdmissionError


class PlanError(AdmissionError):
    """No plan can be made for this model on these devices."""

    code = "plan_error"


class UnknownDevice(PlanError):
    """Nothing is known of a device of this name."""

    code = "device_not_found"
    http_status = 404

    def __init__(self, *, device: str, known: Sequence[str], nearest: str = "") -> None:
        super().__init__(
            f"The device {device!r} is not known{_guess(nearest)}; known devices:"
            f" {', '.join(known)}.",
            device=device,
            known=list(known),
            nearest=nearest,
        )


class UnknownShape(PlanError):
    """No built-in shape has this name, and no folder with a config.json is there."""

    code = "shape_not_found"
    http_status = 404

    def __init__(self, *, model: str, known: Sequence[str], nearest: str = "") -> None:
        super().__init__(
            f"The model {model!r} is not known{_guess(nearest)}; give a folder with a config.json,"
            f" or one of: {', '.join(known)}.",
            model=model,
            known=list(known),
            nearest=nearest,
        )


class ShapeInvalid(PlanError):
    """A model's configuration cannot be counted."""

    code = "shape_invalid"

    def __init__(self, *, model: str, reason: str) -> None:
        super().__init__(
            f"The parameters of {model!r} cannot be counted: {reason}.", model=model, reason=reason
        )


class PlanImpossible(PlanError):
    """The model does not fit on the devices."""

    code = "does_not_fit"

    def __init__(self, *, model: str, wanted: str, reason: str, remedies: Sequence[str]) -> None:
        what = "; or ".join(remedies) or "nothing that is known here, not even many nodes"
        super().__init__(
            f"{model} does not fit on {wanted}: {reason}. What would fit: {what}.",
            model=model,
            wanted=wanted,
            reason=reason,
            remedies=list(remedies),
        )


def _guess(nearest: str) -> str:
    return f" (did you mean {nearest}?)" if nearest else ""
