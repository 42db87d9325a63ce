"""What one program may use."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Isolation = Literal["auto", "namespaces", "rlimit"]
"""How programs are confined; auto takes the strongest that the machine has."""
Level = Literal["namespaces", "rlimit"]
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """A program that exceeds one of them has failed its tests: that is its answer.

    Args:
        cpu_seconds: CPU time of one run (the test program, or one stdin case), its child processes included.
        wall_seconds: the whole completion, all its cases together. A backstop: on a busy machine it is CPU time that should decide.
        memory_bytes: address space of a process; at the level ``namespaces`` also what all processes of the program hold together.
        processes: processes and threads at once.
        file_bytes: longest file.
        folder_bytes: all files of the working folder together (``namespaces``).
        output_bytes: stdout and stderr together.
        open_files: file descriptors of a process.
    """

    cpu_seconds: float = 5.0
    wall_seconds: float = 10.0
    memory_bytes: int = 1024 * MIB
    processes: int = 32
    file_bytes: int = 16 * MIB
    folder_bytes: int = 64 * MIB
    output_bytes: int = 16 * MIB
    open_files: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"Limits.{field.name}={getattr(self, field.name)} must be above 0")
