"""What the handlers of the embedded server share: bodies and answers in JSON."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from areal.inference.embedded.request import RequestError


def json_response(content: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


def failure(sentence: str, status: int = 400) -> web.Response:
    return json_response({"success": False, "message": sentence, "error": {"message": sentence}}, status)


def parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def parse_object(body: bytes) -> dict[str, Any]:
    content = parse_json(body) if body else {}
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content
