# SPDX-License-Identifier: BSD-3-Clause
"""A loop of arithmetic that tells whether something shares the core, and waiting until nothing does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

SPIN = "spin"
ELEMENTS, CALLS = 2048, 64
CALM = 1.1  # times the least time of the loop
PATIENCE, LEAST = "SOFTCE_BENCH_PATIENCE", "SOFTCE_BENCH_SPIN"  # seconds, for processes of their own too
_LOOK_S, _PAUSE_S = 1.0, 0.02


class Spin:
    """A fixed loop of arithmetic in the first-level cache: it takes longer where something shares the core."""

    def __init__(self) -> None:
        self.source, self.buffer = torch.linspace(-1, 1, ELEMENTS), torch.empty(ELEMENTS)

    def __call__(self) -> None:
        for _ in range(CALLS):
            torch.exp(self.source, out=self.buffer)

    def least(self, tries: int = 3) -> float:
        """Seconds of the shortest of a few runs."""
        found = []
        for _ in range(tries):
            start = time.perf_counter()
            self()
            found.append(time.perf_counter() - start)
        return min(found)


class Calm:
    """Waits while the loop takes more than ``CALM`` of its least time, for ``patience`` seconds in all.

    Only the loop's time decides, never a contestant's. Without patience it neither waits nor looks.
    """

    def __init__(self) -> None:
        self.left = float(os.environ.get(PATIENCE, 0))
        self.known = float(os.environ.get(LEAST, "inf"))
        self.spin = Spin()

    def wait(self) -> float:
        """Returns the seconds that it waited."""
        waited = 0.0
        while self.left > 0:
            start = time.perf_counter()
            now = self.spin.least()
            self.known = min(self.known, now)
            if now <= CALM * self.known:
                break
            time.sleep(_PAUSE_S)
            elapsed = time.perf_counter() - start
            self.left -= elapsed
            waited += elapsed
        return waited


def remember(patience: float, records: Iterable[Mapping[str, Any]]) -> None:
    """Tells :class:`Calm`, here and in processes to come, how long to wait and what the loop takes at least."""
    if not patience:
        os.environ.pop(PATIENCE, None)
        return
    spin, known = Spin(), []
    end = time.perf_counter() + _LOOK_S
    while time.perf_counter() < end:
        known.append(spin.least())
    known += [
        record["results"][SPIN]["min_s"] for record in records if "min_s" in record.get("results", {}).get(SPIN, {})
    ]
    os.environ[PATIENCE], os.environ[LEAST] = str(patience), str(min(known))
