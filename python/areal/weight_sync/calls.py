"""What a transport's threads do beside a transfer: calls to a rollout server, each in a thread of its own."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")


class CallFailed(RuntimeError):
    """A server refused a call, its connection broke, or it took too long; the message is half a sentence that says which."""


class Task(Generic[T]):
    """A function in a daemon thread: whoever waits for it may give it up."""

    def __init__(self, name: str, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ended(self, timeout: float = 0.0) -> bool:
        """Whether it has ended, waiting up to ``timeout`` seconds for it; raises what the function raised."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def result(self) -> T:
        """Once it has ended."""
        assert not self._thread.is_alive()
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._function()
        except Exception as error:  # thread boundary: it is raised where somebody waits
            self._error = error


def post(url: str, path: str, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The JSON object that the server answers within ``timeout`` seconds. ``CallFailed``."""
    start = time.monotonic()
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=max(timeout, 0.001))
    try:
        connection.request("POST", address.path.rstrip("/") + path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except TimeoutError:
        raise CallFailed(f"no answer to {path} within {time.monotonic() - start:.1f} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise CallFailed(f"the connection broke at {path} ({str(error) or type(error).__name__})") from None
    finally:
        connection.close()
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        answer = {"message": content.decode(errors="replace")}
    if response.status != 200 or answer.get("success") is False:
        raise CallFailed(f"it refused {path} with status {response.status}: {str(answer.get('message') or answer)[:500]}")
    return answer
