"""Waits that end when they should."""

from __future__ import annotations

import ctypes
import sys
import time

# The last part of a wait is spun: a sleeping process wakes up to this much late.
_SPIN_S = 40e-6
_PR_SET_TIMERSLACK = 29


def occupy_until(moment_s: float) -> None:
    """Wait until ``moment_s`` on ``time.perf_counter``'s clock, to within some microseconds."""
    rest_s = moment_s - _SPIN_S - time.perf_counter()
    if rest_s > 0:
        time.sleep(rest_s)
    while time.perf_counter() < moment_s:
        pass


def be_punctual() -> None:
    """Let this thread's sleeps end when they should, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
