"""The guard's own replies."""

from __future__ import annotations

import json

from starlette.responses import Response

RETRY_AFTER_SECONDS = 5


def error(status: int, message: str, *, param: str | None = None, code: str | None = None,
          headers: dict[str, str] | None = None) -> Response:
    """An error reply in OpenAI's format. The body is ASCII, so that any text from a client can be encoded."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return Response(body, status, headers, media_type="application/json")
