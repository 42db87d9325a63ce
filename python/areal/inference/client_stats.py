"""What a server that has no /engine_stats did, as its client saw it."""

from __future__ import annotations

import time
from typing import Any, Literal

Activity = Literal["generation", "weight_sync"]


class GenerationMeter:
    """Counts one server's tokens and the time with something in flight. Times are time.time() seconds."""

    def __init__(self) -> None:
        self.tokens_generated = 0
        self._busy_seconds = 0.0
        self._activity: Activity | None = None
        self._since = 0.0
        self._spans: list[list[Any]] = []

    def set_activity(self, activity: Activity | None) -> None:
        """What the server does from now on; what it did until now is counted."""
        now = time.time()
        if self._activity is not None:
            self._spans.append([self._activity, self._since, now])
        if self._activity == "generation":
            self._busy_seconds += now - self._since
        self._activity, self._since = activity, now

    def read(self) -> dict[str, Any]:
        """In the form of /engine_stats: counts so far, spans since the last call."""
        self.set_activity(self._activity)
        spans, self._spans = self._spans, []
        return {"tokens_generated": self.tokens_generated, "busy_seconds": self._busy_seconds, "spans": spans}
