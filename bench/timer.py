# SPDX-License-Identifier: BSD-3-Clause
"""The one timer: contestants interleaved in one process, medians, ratios taken round by round.

A machine's speed drifts (frequency, neighbours, page cache). Contestants that take turns see the same drift, so the
ratio of two samples of one round is steadier than the ratio of two medians; only ratios are compared with targets.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .calm import Calm

MIN_SAMPLE_S = 0.002  # a sample repeats its call until it lasts this long
PRIME_BELOW_S = 0.02  # calls shorter than this get an untimed sample of their own before each one
SLOW_S = 45.0  # a first call longer than this is the only sample: nothing else in it weighs next to the work
MAX_ROUNDS = 60


def _nothing() -> None:
    pass


@dataclass
class Entry:
    """One contestant: ``run`` is timed; ``before`` and ``after`` are not. ``note`` goes to the report.

    ``gradient`` gives what the last ``run`` left, before ``after`` lets go of it; None for contestants without one.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing
    gradient: Callable[[], Tensor | None] | None = None
    note: str = ""


@dataclass
class Samples:
    """What one contestant took: seconds per call, one value a round, and the page faults of a call."""

    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    calls: int = 1
    first_call: float = 0.0
    waited: float = 0.0  # seconds for a calm core, of all samples together
    note: str = ""
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, object]:
        if self.error is not None:
            return {"error": self.error}
        low, high = quartiles(self.seconds)
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "iqr_s": high - low,
            "first_call_s": self.first_call,
            "calls_per_sample": self.calls,
            "page_faults": statistics.median(self.faults),
            "seconds": self.seconds,
            **({"waited_s": self.waited} if self.waited else {}),
            **({"note": self.note} if self.note else {}),
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; both the value itself where there is one only."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the round-by-round quotients (over the rounds both took part in)."""
    quotients = [a / b for a, b in zip(numerator, denominator, strict=False)]
    low, high = quartiles(quotients)
    return statistics.median(quotients), low, high


def ratio_of_least(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Quotient of the least samples: what is left where neighbours take a part of the machine from some of them."""
    return min(numerator) / min(denominator)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _sample(entry: Entry, calls: int) -> tuple[float, float]:
    entry.before()
    faults = _faults()
    start = time.perf_counter()
    for _ in range(calls):
        entry.run()
    elapsed = time.perf_counter() - start
    faults = _faults() - faults
    entry.after()
    return elapsed / calls, faults / calls


def _warm_up(entry: Entry, samples: Samples) -> float:
    """First call (compilers compile, pools fill), then an estimate of the steady time of one call."""
    samples.first_call, faults = _sample(entry, 1)
    if samples.first_call > SLOW_S:
        samples.seconds, samples.faults = [samples.first_call], [faults]
        samples.note = f"{samples.note}; first call only".lstrip("; ")
        return samples.first_call
    estimate, _ = _sample(entry, 1)
    if estimate < PRIME_BELOW_S:  # the least of a few: one hiccup here would make every sample too short
        estimate = min(estimate, *(_sample(entry, 5)[0] for _ in range(3)))
    samples.calls = max(1, round(MIN_SAMPLE_S / max(estimate, 1e-9)))
    return estimate


def interleave(
    entries: Sequence[Entry],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = MAX_ROUNDS,
    on_round: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Samples]:
    """Times ``entries`` in turns, shuffled anew each round, for about ``seconds`` in all.

    An entry that raises is reported with its error and takes no further part. One that alone would overrun the time
    fourfold (a minute-long call) takes part in the first rounds only, at least one. ``on_round`` hears
    ``(done, total)``. Where patience was asked for, each sample waits for a calm core (:mod:`bench.calm`).
    """
    calm = Calm()
    results = {entry.name: Samples(note=entry.note) for entry in entries}
    if len(results) != len(entries):
        raise ValueError(f"entry names must differ, got {[e.name for e in entries]}")
    estimates: dict[str, float] = {}
    for entry in entries:
        try:
            estimates[entry.name] = _warm_up(entry, results[entry.name])
        except Exception as error:
            results[entry.name].error = describe(error)

    alive = [e for e in entries if results[e.name].error is None and not results[e.name].seconds]
    cost = sum(estimates[e.name] * results[e.name].calls for e in alive)
    rounds = max(min_rounds, min(max_rounds, int(seconds / max(cost, 1e-9))))
    allowed = max(4 * seconds, 1.0)  # of one contestant
    limit = {e.name: max(1, int(allowed / (estimates[e.name] * results[e.name].calls))) for e in alive}

    order = random.Random(0)
    gc_was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            turn = [e for e in alive if results[e.name].error is None and done < limit[e.name]]
            order.shuffle(turn)
            for entry in turn:
                samples = results[entry.name]
                samples.waited += calm.wait()
                try:
                    if estimates[entry.name] < PRIME_BELOW_S:
                        _sample(entry, samples.calls)
                    per_call, faults = _sample(entry, samples.calls)
                except Exception as error:
                    samples.error = describe(error)
                    continue
                samples.seconds.append(per_call)
                samples.faults.append(faults)
            on_round(done + 1, rounds)
    finally:
        if gc_was_on:
            gc.enable()
    return results


def describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
