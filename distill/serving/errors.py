"""Errors of requests, in the JSON form of OpenAI's API."""

import json
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


MAX_MESSAGE = 500  # characters: a message may quote the request


class ApiError(Exception):
    """A request that is refused or has failed.

    Args:
      message: one line: what is wrong and what to do.
      status: of HTTP.
      param: the field of the body that is at fault.
      code: a word for programs, such as context_length_exceeded.
      retry_after: seconds after which the same request may succeed; 0: not said.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": TYPES.get(self.status, "invalid_request_error")}
        return {"error": {**error, "param": self.param, "code": self.code}}

    def to_bytes(self) -> bytes:
        # A message may quote half a surrogate pair of the request: only ASCII is written.
        return json.dumps(self.to_json()).encode()

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
