# SPDX-License-Identifier: BSD-3-Clause
"""Measurements in a process of their own: peak memory, and timing from a heap without a history.

``python -m bench.isolate`` reads one job as JSON from standard input and writes its result to the file named there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# glibc gives large blocks back to the system at once and gets them anew, zeroed, page by page, at the next call.
# With these, every block comes from a heap that only grows, so after the warm-up no contestant faults a page.
_HUGE = 1 << 36
NO_PAGE_FAULTS = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={_HUGE}"
    f":glibc.malloc.top_pad={1 << 28}:glibc.malloc.arena_max=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_HUGE),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",
}


def command(module: str, *arguments: str) -> list[str]:
    """Starts ``module`` of this very tree, whatever the current directory or the environment holds."""
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code, *arguments]


def run(job: dict[str, Any], env: dict[str, str] | None = None, timeout: float = 3600.0) -> dict[str, Any]:
    """Runs ``job`` in a fresh interpreter; a failure comes back as ``{"error": ..}``, never as an exception."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        try:
            done = subprocess.run(
                command("bench.isolate"),
                input=json.dumps({**job, "out": str(out)}),
                env={**os.environ, **(env or {})},
                text=True,
                stderr=subprocess.PIPE,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:.0f} s"}
        if done.returncode == 0 and out.exists():
            result: dict[str, Any] = json.loads(out.read_text())
            return result
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit status {done.returncode}: {last[:300]}"}


def _memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of one call over what was resident before it, inputs made and every library warm."""
    import torch

    from softce.demo.rss import PeakMeter

    from .adapters import entries
    from .suites import SUITES

    torch.set_num_threads(job["threads"])
    suite = SUITES[job["suite"]]
    inputs = suite.make_inputs(suite.case_of(job["case"]))
    found, skipped = entries([job["name"]], inputs, suite.adapters)
    if skipped:
        return {"skipped": skipped[job["name"]]}
    entry = found[0]
    for _ in range(2):  # compiles, loads code, fills pools
        entry.before()
        entry.run()
        entry.after()
    _empty_pools()
    entry.before()
    meter = PeakMeter()
    meter.start()
    entry.run()
    return {"peak_bytes": meter.peak(), "exact": meter.exact}


def _empty_pools() -> None:
    """What a pool kept from the warm-up would otherwise be missing from the peak."""
    softce = sys.modules.get("softce")
    if softce is not None and hasattr(softce, "empty_cache"):
        softce.empty_cache()


def _time(job: dict[str, Any]) -> dict[str, Any]:
    from .suites import SUITES

    suite = SUITES[job["suite"]]
    case = suite.case_of(job["case"])
    return suite.time_case(case, job["names"], seconds=job["seconds"], threads=job["threads"])


JOBS = {"memory": _memory, "time": _time}


def main() -> None:
    job = json.load(sys.stdin)
    result = JOBS[job["job"]](job)
    Path(job["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
