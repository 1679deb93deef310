"""Errors as clients of the OpenAI API know them: a status, and an object that says what, where and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from edgekv.errors import EdgeKVError, OutOfPages, PromptTooLong, StoreError, TooBusy, UsageError
from edgekv.schema import did_you_mean, shown

_log = logging.getLogger(__name__)
#: Seconds after which a client may ask again, where the server is busy or ends.
RETRY_AFTER_S = 2
#: What OpenAI calls the kinds of errors, by status; others below 500 are requests that are wrong.
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered, or an answer that ends.

    Attributes:
        param: the field of the request that is to blame, such as ``messages[0].content``.
        code: one word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the object that tells of it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return what a client should know before it asks again."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER_S)}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        # The official clients ask again after a 408 and every 5xx; the same question would take as long, or fail again.
        return {"x-should-retry": "false"} if self.status == 408 or self.status >= 500 else {}


def closing() -> ApiError:
    """Return what is said while the server ends."""
    return ApiError(503, "the server is closing; ask again when it is back", code="closing")


def told(error: EdgeKVError) -> ApiError:
    """Return an error of the runtime as clients are told of it."""
    if isinstance(error, TooBusy):
        return ApiError(429, str(error), code="too_busy")
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, (StoreError, OutOfPages)):
        _log.error("a request ended: %s", error)  # it names folders, which are none of a client's business
        return ApiError(
            503, "the server has no room for this request, or its storage failed; see its log", code="no_room"
        )
    return ApiError(500, str(error))


def not_valid(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """Return what is wrong with a request, from what pydantic found.

    Args:
        errors: of :meth:`pydantic.ValidationError.errors`.
        known: the fields that a request of this kind has.
    """
    # Of the branches of a union, the one that was meant says most: what came is of its type.
    found = max(
        errors,
        key=lambda error: (error["type"] == "value_error", not error["type"].endswith("_type"), len(error["loc"])),
    )
    place = _place(found["loc"])
    given = found.get("input")
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if found["type"] == "extra_forbidden":
        hint = did_you_mean(place, known) if "." not in place else ""
        return ApiError(
            400, f"{shown(place)} is not a field that this server understands; {hint}".rstrip(" ;"), param=place
        )
    if found["type"] == "missing":
        return ApiError(400, f"{place or 'the body'} is missing", param=place or None)
    if not place and isinstance(given, (bytes, str)):
        return ApiError(400, "the body was not sent as JSON; send it with the header Content-Type: application/json")
    reason = found["msg"].removeprefix("Value error, ")
    reason = reason if found["type"] == "value_error" else f"{reason[:1].lower()}{reason[1:]}, not {shown(given)}"
    return ApiError(400, f"{place}: {reason}".lstrip(": "), param=place or None)


def _place(steps: Sequence[str | int]) -> str:
    """Return a place as people write it: ``messages[0].content``."""
    names = [
        step for step in steps if isinstance(step, int) or (step.isidentifier() and step not in ("body", "str", "int"))
    ]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in names).lstrip(".")
