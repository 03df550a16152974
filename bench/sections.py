# SPDX-License-Identifier: BSD-3-Clause
"""The sections of a run: which cases each measures, and how."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import adapters, cases, forms, isolate, linear, measure
from .measure import Progress, Record
from .suites import SUITES

THREADS_FROM = 1 << 22


@dataclass(frozen=True)
class Settings:
    """What a run was asked for; it goes into the JSON file as it is."""

    seconds: float = 4.0  # timed per case, all contestants together
    threads: tuple[int, ...] = (1,)
    scaling: tuple[int, ...] = (1, 2)
    quick: bool = False
    contestants: tuple[str, ...] = ()  # empty: all
    page_faults: str = "default"
    patience: float = 0.0  # seconds a case waits, in all, for a core that nothing shares

    def names(self, registry: dict[str, adapters.Adapter]) -> list[str]:
        return [name for name in registry if not self.contestants or name in self.contestants]


@dataclass(frozen=True)
class Job:
    """One measurement to come: ``run(progress)`` gives its record, which belongs to ``section``."""

    section: str
    case: Any
    run: Callable[..., Record]


def _time(
    suite: str, case: Any, names: list[str], settings: Settings, threads: int, page_faults: str, progress: Progress
) -> Record:
    """Times ``case`` in a process of its own, whose heap has no history; in this one where a check is all it is."""
    if settings.quick and page_faults == "default":
        return SUITES[suite].time_case(case, names, seconds=settings.seconds, threads=threads, progress=progress)
    job = {"job": "time", "suite": suite, "case": dataclasses.asdict(case), "names": names, "threads": threads}
    env = {"default": {}, "none": isolate.NO_PAGE_FAULTS}[page_faults]
    record = isolate.run({**job, "seconds": settings.seconds}, env)
    if "error" not in record:
        return record
    failed = dict.fromkeys(names, record["error"])
    return measure.record_of("", case, {}, {}, failed, threads=threads, bytes=getattr(case, "traffic", None))


def logits(settings: Settings) -> Iterator[Job]:
    names = settings.names(adapters.ADAPTERS)
    base = "logits" if settings.page_faults == "default" else "no-page-faults"
    for threads in settings.threads:
        section = base if threads == 1 else f"{base}, {threads} threads"
        for case in cases.all_cases(settings.quick):
            timed = functools.partial(_time, "logits", case, names, settings, threads, settings.page_faults)
            yield Job(section, case, timed)


def no_page_faults(settings: Settings) -> Iterator[Job]:
    """The wide cases once more, with an allocator that never gives memory back."""
    names = settings.names(adapters.ADAPTERS)
    shapes = ((64, 32768),) if settings.quick else ((16384, 1000), (512, 32768), (128, 131072))
    for case in cases.all_cases(settings.quick):
        if case.shape in shapes and case.dtype == "float32":
            yield Job("no-page-faults", case, functools.partial(_time, "logits", case, names, settings, 1, "none"))


def threads(settings: Settings) -> Iterator[Job]:
    """softce and the memcpy at one and at several threads, interleaved, on every large shape."""
    if len(settings.scaling) < 2:
        return
    wanted = {"soft+smoothed", "hard"}
    for case in cases.all_cases(settings.quick):
        if case.kind not in wanted or (case.elements <= THREADS_FROM and not settings.quick):
            continue

        names = ("softce", "memcpy")
        scaling = functools.partial(measure.thread_scaling, case, names, settings.scaling, seconds=settings.seconds)
        yield Job("threads", case, scaling)


def _peaks(suite: str, case: Any, names: list[str], progress: Progress) -> Record:
    record = measure.record_of("", case, {}, {}, gradient_bytes=case.gradient_bytes)
    for done, name in enumerate(names):
        job = {"job": "memory", "suite": suite, "case": dataclasses.asdict(case), "name": name, "threads": 1}
        record["results"][name] = isolate.run(job)
        progress(done + 1, len(names))
    return record


def form_memory(settings: Settings) -> Iterator[Job]:
    names = settings.names({name: forms.ADAPTERS[name] for name in forms.FORMS})
    for case in forms.all_cases(settings.quick):
        if case.dtype == "float32":
            yield Job("forms-memory", case, functools.partial(_peaks, "forms", case, names))


def memory(settings: Settings) -> Iterator[Job]:
    names = [name for name in settings.names(adapters.ADAPTERS) if name not in adapters.BARE]
    shapes = ((64, 32768),) if settings.quick else ((16384, 1000), (512, 32768), (64, 262144), (8, 21, 256, 256))
    for case in cases.all_cases(settings.quick):
        if case.shape in shapes and case.kind in ("hard", "soft+smoothed") and case.dtype == "float32":
            yield Job("memory", case, functools.partial(_peaks, "logits", case, names))


def every_form(settings: Settings) -> Iterator[Job]:
    names = settings.names(forms.ADAPTERS)
    for case in forms.all_cases(settings.quick):
        yield Job("forms", case, functools.partial(_time, "forms", case, names, settings, 1, "default"))


def linear_time(settings: Settings) -> Iterator[Job]:
    names = settings.names(linear.ADAPTERS)
    for case in linear.all_cases(settings.quick):
        yield Job("linear", case, functools.partial(_time, "linear", case, names, settings, 1, "default"))


def linear_memory(settings: Settings) -> Iterator[Job]:
    names = [name for name in settings.names(linear.ADAPTERS) if name != "gemms"]
    for case in linear.all_cases(settings.quick):
        if (settings.quick or (case.rows, case.hidden) == linear.WANTED) and case.dtype == "float32":
            # torch's default chunk takes minutes at the largest vocabulary, and its memory is known from the next one
            kept = [name for name in names if name != "chunked" or case.classes <= 32768]
            if case.kind in ("hard", "soft+smoothed"):
                yield Job("linear-memory", case, functools.partial(_peaks, "linear", case, kept))


SECTIONS: dict[str, Callable[[Settings], Iterator[Job]]] = {
    "logits": logits,
    "no-page-faults": no_page_faults,
    "threads": threads,
    "memory": memory,
    "forms": every_form,
    "forms-memory": form_memory,
    "linear": linear_time,
    "linear-memory": linear_memory,
}
