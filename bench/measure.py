# SPDX-License-Identifier: BSD-3-Clause
"""One case: inputs, contestants, accuracy, interleaved timing; the record that goes to the JSON file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import accuracy, adapters
from .cases import DTYPES, Case, Inputs, make_inputs
from .timer import Entry, Samples, describe, interleave

Record = dict[str, Any]
Progress = Callable[[int, int], object]


def ignore(done: int, total: int) -> None:
    pass


def record_of(
    section: str,
    case: Any,
    samples: dict[str, Samples],
    skipped: dict[str, str],
    failed: dict[str, str] | None = None,
    **more: Any,
) -> Record:
    """The JSON form of one measurement, shared by every section.

    Each contestant has its figures, or why it was ``skipped`` (it cannot run this), or its ``error`` (it should have).
    """
    results: dict[str, Record] = {name: dict(sample.as_json()) for name, sample in samples.items()}
    results.update({name: {"skipped": reason} for name, reason in skipped.items()})
    results.update({name: {"error": error} for name, error in (failed or {}).items()})
    described = {**dataclasses.asdict(case), "id": case.id, "label": case.label}
    return {"section": section, "case": described, "results": results, **more}


def time_case(
    case: Case, names: Sequence[str], *, seconds: float, threads: int = 1, progress: Progress = ignore
) -> Record:
    """Times the contestants ``names`` on ``case`` and holds each gradient against float64: a wrong one has no time."""
    torch.set_num_threads(threads)
    inputs = make_inputs(case)
    found, skipped = adapters.entries(names, inputs)
    with adapters.no_recompiles(names):
        samples = interleave(found, seconds=seconds, on_round=progress)
        accuracies, wrong = check(inputs, [entry for entry in found if samples[entry.name].error is None])
    record = record_of("logits", case, samples, skipped, wrong, threads=threads, bytes=case.traffic)
    for name, result in record["results"].items():
        if name in accuracies:
            result.update(gradient_error=accuracies[name].gradient, loss_error=accuracies[name].loss)
        if "median_s" in result and name != adapters.SPIN:
            result["least_gb_per_s"] = case.traffic["least_bytes"] / result["median_s"] / 1e9
    return record


def check(inputs: Inputs, entries: Sequence[Entry]) -> tuple[dict[str, accuracy.Errors], dict[str, str]]:
    """Runs each entry once more: errors against float64, and what is wrong with those that do not compute the loss.

    After the timing, since the float64 blocks would leave free memory in the heap for some contestants to find.
    """
    wrong: dict[str, str] = {}
    outputs = {}
    for entry in entries:
        if entry.gradient is None:
            continue
        try:
            entry.before()
            loss = entry.run()
            gradient = entry.gradient()
            assert isinstance(loss, torch.Tensor) and gradient is not None
            outputs[entry.name] = (loss.clone(), gradient.clone())
            entry.after()
        except Exception as error:
            wrong[entry.name] = describe(error)
    measured = accuracy.Reference(inputs).errors(outputs) if outputs else {}
    limit = accuracy.gradient_limit(DTYPES[inputs.case.dtype])
    for name, errors in measured.items():
        if not errors.gradient <= limit:
            wrong[name] = f"wrong gradient: relative error {errors.gradient:.1e} against float64, limit {limit:.1e}"
    return measured, wrong


def thread_scaling(
    case: Case, names: Sequence[str], counts: Sequence[int], *, seconds: float, progress: Progress = ignore
) -> Record:
    """Contestants at several thread counts, interleaved: entries ``NAME@1``, ``NAME@2``, .."""
    inputs = make_inputs(case)
    found: list[Entry] = []
    skipped: dict[str, str] = {}
    for name, count in itertools.product(names, counts):
        entries, why = adapters.entries([name], inputs)
        skipped.update({f"{name}@{count}": reason for reason in why.values()})
        found += [_on_threads(entry, count) for entry in entries]
    samples = interleave(found, seconds=seconds, on_round=progress)
    torch.set_num_threads(counts[0])
    return record_of("threads", case, samples, skipped)


def _on_threads(entry: Entry, count: int) -> Entry:
    def before() -> None:
        torch.set_num_threads(count)
        entry.before()

    return dataclasses.replace(entry, name=f"{entry.name}@{count}", before=before)
