"""Runs SGLang's server in the server's own interpreter, so that no process of it outlives whoever started it.

Standard library only: the environment of the server need not have areal. Every word of the command line goes to SGLang.

SGLang's schedulers and its detokenizer ask the kernel to be killed with their parent only once they have imported everything, which
takes seconds; a parent killed before that would leave them. multiprocessing imports the main file, this one, into each of them first.
"""

import ctypes
import os
import runpy
import signal
import sys

PARENT_VARIABLE = "AREAL_PARENT_PID"
_SPAWNER_VARIABLE = "AREAL_SPAWNER_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when ``parent`` dies, however that happens; a parent that is dead already ends it here."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    starter = os.environ.pop(PARENT_VARIABLE, None)
    if starter is not None:  # a run; a server that somebody started by itself may outlive its shell
        die_with_parent(int(starter))
    os.environ[_SPAWNER_VARIABLE] = str(os.getpid())
    runpy.run_module("sglang.launch_server", run_name="__main__")
elif __name__ == "__mp_main__":
    # By the number it was told: the parent of one whose parent has died meanwhile is another process.
    die_with_parent(int(os.environ[_SPAWNER_VARIABLE]))
    os.environ[_SPAWNER_VARIABLE] = str(os.getpid())
