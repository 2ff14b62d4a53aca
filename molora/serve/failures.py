"""Which status and which words an error has: OpenAI's form for each of them, and nothing of the server's inside."""

import logging
import math
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as PlainHTTPException

from molora.errors import (
    AdapterError,
    BusyError,
    ConfigError,
    DataError,
    MoLoRAError,
    RequestError,
    SelectionError,
    StackError,
    StoreError,
    VersionError,
)
from molora.serve.names import UnknownNameError
from molora.serve.protocol import complaint
from molora.serve.replies import error_body

log = logging.getLogger("molora.serve")

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class TimeoutFailure(MoLoRAError):
    """An answer took longer than the server allows."""


class EngineFailure(MoLoRAError):
    """The engine could not go on; the same request may do well later."""


def failure(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error's answer."""
    return JSONResponse(error_body(message, _kind(status), param, code), status_code=status, headers=headers)


def described(error: Exception) -> tuple[int, str, str | None]:
    """Status, message and code of an error that has a meaning for the client."""
    if isinstance(error, UnknownNameError):
        return 404, str(error), "model_not_found"
    if isinstance(error, BusyError):
        return 429, str(error), "busy"
    if isinstance(error, TimeoutFailure):
        return 408, str(error), "timeout"
    if isinstance(error, EngineFailure):
        return 503, str(error), "engine_failure"
    if isinstance(error, RequestError | SelectionError | DataError | StackError | AdapterError):
        return 400, str(error), None
    if isinstance(error, ConfigError):  # the file of keys; its path is no client's business
        log.error("%s", error)
        return 503, "The server's keys cannot be read at the moment.", "keys_unreadable"
    log.error("%s: %s", type(error).__name__, error)
    if isinstance(error, StoreError | VersionError):  # its address and files are no client's business either
        return 503, "The store of adapters cannot do this at the moment.", "store_unavailable"
    return 500, "The server made a mistake.", "internal_error"


def stream_error(error: Exception) -> dict[str, Any]:
    """As the last data of a stream that has begun."""
    status, message, code = described(error)
    return error_body(message, _kind(status), None, code)


def answer_errors(app: FastAPI) -> None:
    """Lets ``app`` answer every error in OpenAI's form."""

    @app.exception_handler(MoLoRAError)
    async def _ours(request: Request, error: MoLoRAError) -> JSONResponse:
        status, message, code = described(error)
        headers = None
        if isinstance(error, BusyError):
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return failure(status, message, code=code, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, field = complaint(list(error.errors()))
        return failure(400, message, field)

    @app.exception_handler(PlainHTTPException)
    async def _plain(request: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _other(request: Request, error: Exception) -> JSONResponse:
        return failure(500, "The server made a mistake.", code="internal_error")


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
