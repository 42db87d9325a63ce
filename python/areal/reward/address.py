"""Addresses of reward services, without the client: configurations are checked before aiohttp is needed."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

SCHEMES = ("http", "https")
_CONNECT_SECONDS = 5.0


def is_service(reward_fn: str) -> bool:
    """Whether a config means a service, and not an import path."""
    return "://" in reward_fn


def service_address(url: str) -> tuple[str, int]:
    """Host and port. ``ValueError`` in one sentence for anything but http://host[:port][/path]."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in SCHEMES or not parts.hostname or port == 0 or re.search(r"\s", url):
        raise ValueError(f"'{url}' is not the address of a reward service")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def why_unreachable(url: str) -> str:
    """Why nothing can be sent there now; empty when something listens."""
    try:
        with socket.create_connection(service_address(url), timeout=_CONNECT_SECONDS):
            return ""
    except OSError as error:
        return str(error.strerror or error) or type(error).__name__
