"""How many threads the CPU ops use, and how they wait."""

from __future__ import annotations

import os
import sys

_WISH = os.environ.get("OMP_NUM_THREADS", "")  # as it was before this package imports Paddle
_PADDLE_WAS_IMPORTED = "paddle" in sys.modules

# Idle threads of the ops sleep after microseconds instead of spinning for milliseconds, which on a machine with other
# work makes a decode step many times slower. Read when libgomp is loaded, by Paddle's import at the latest.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def default_num_threads() -> int:
    """OMP_NUM_THREADS where the user set it, else this process's share of the cores that it may run on.

    Importing Paddle sets OMP_NUM_THREADS to 1 when it is not set, so that once Paddle is imported, or its launcher has
    started this process, a 1 says nothing. The launcher's processes of this machine share the cores.
    """
    launched = os.environ.get("PADDLE_LOCAL_SIZE", "")
    if _WISH.isdecimal() and int(_WISH) >= 1 and not (_WISH == "1" and (_PADDLE_WAS_IMPORTED or launched)):
        return int(_WISH)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(launched)) if launched.isdecimal() and int(launched) > 1 else cores
