# SPDX-License-Identifier: BSD-3-Clause
"""Peak resident memory of a stretch of code, read from the kernel's own books (``/proc/self``)."""

from __future__ import annotations

import ctypes
import gc
import resource


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def _reset_peak() -> bool:
    """Starts the high-water mark anew at the present size (Linux: 5 to ``clear_refs``); False where not allowed."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Gives unused heap back to the system, so that a baseline holds what is alive only."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class PeakMeter:
    """Bytes that the resident set grew above its size at ``start()``.

    >>> meter = PeakMeter(); meter.start()
    >>> block = bytearray(1 << 24)
    >>> meter.peak() >= 1 << 24
    True

    ``exact`` is False where the high-water mark could not be reset: a peak from before ``start()`` may hide a
    smaller one after it then.
    """

    def __init__(self) -> None:
        self.baseline = 0
        self.exact = False

    def start(self) -> None:
        trim()
        self.exact = _reset_peak()
        self.baseline = _status("VmRSS")

    def peak(self) -> int:
        try:
            high = _status("VmHWM")
        except OSError:
            high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(0, high - self.baseline)
