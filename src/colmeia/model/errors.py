"""The one tree of errors, ordered by *what the caller can do* about them.

Every error has a stable ``code`` (the API contract), says what was tried on what and what happened, and carries a
``hint``: what the reader can do now. Never a secret in any of them.
"""

from typing import ClassVar


class ColmeiaError(Exception):
    """An error with a stable code, a sentence about what happened and a hint about what to do.

    ``status`` is the HTTP status the API edge answers with (RFC 9110), ``exit_code`` what the CLI ends with.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class Invalid(ColmeiaError):
    """The request is wrong by itself: change it."""

    status = 422
    kind = "invalid"


class NotFound(ColmeiaError):
    """What was named does not exist."""

    status = 404
    kind = "not_found"


class Conflict(ColmeiaError):
    """The request is right but the state of the object does not allow it: look, then decide."""

    status = 409
    kind = "conflict"


class Busy(ColmeiaError):
    """Something else holds it for the moment: try again."""

    status = 409
    kind = "busy"


class Forbidden(ColmeiaError):
    """The caller may not do this."""

    status = 403
    kind = "forbidden"


class Unauthenticated(ColmeiaError):
    """Nobody knows who the caller is."""

    status = 401
    kind = "unauthenticated"


class PreconditionFailed(ColmeiaError):
    """The object has changed since the caller read it (If-Match): read again, then decide."""

    status = 412
    kind = "precondition_failed"


class Unavailable(ColmeiaError):
    """Something outside is missing or down: mend it, then try again."""

    status = 503
    kind = "unavailable"


class Unsupported(ColmeiaError):
    """This host, machine type or guest cannot do it at all."""

    status = 422
    kind = "unsupported"


class OutcomeUnknown(ColmeiaError):
    """It may or may not have happened: observe before anything else."""

    status = 500
    kind = "outcome_unknown"


class Internal(ColmeiaError):
    """A defect of Colmeia."""

    status = 500
    kind = "internal"


ERRORS: dict[str, type[ColmeiaError]] = {
    error.kind: error
    for error in (
        Invalid,
        NotFound,
        Conflict,
        Busy,
        Forbidden,
        Unauthenticated,
        PreconditionFailed,
        Unavailable,
        Unsupported,
        OutcomeUnknown,
        Internal,
    )
}
"""Every kind by its word, for reading a stored error back."""
