# SPDX-License-Identifier: BSD-3-Clause
"""The figures to reach, as data, and their evaluation against a set of records.

A target names the records it is about, the figure taken from each and the bound. It is met when every one of its
records meets it, missed when one does not, and "not measured" when a run has no such record: a run that leaves
something out never meets a target by that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import LARGE
from .machine import has_bf16_instructions
from .measure import Record
from .timer import ratio, ratio_of_least

COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Target:
    """``figure op bound`` for every record of ``section`` that ``where`` picks (it sees the case as JSON)."""

    what: str
    section: str
    where: Callable[[dict[str, Any]], bool]
    figure: tuple[str, ...]
    op: str
    bound: float
    needs: str = ""  # "no-bf16-instructions": applies only to machines without them

    @property
    def figure_text(self) -> str:
        kind, *names = self.figure
        if kind == "time":
            return f"time of {names[0]} / {names[1]}"
        return {
            "gradient_error": f"gradient error of {names[0]}",
            "gradient_error_over_rounding": f"gradient error of {names[0]} / one rounding",
            "peak": f"peak memory of {names[0]} / one gradient",
            "peak_beyond": f"peak memory of {' / '.join(names)}, beyond the gradients",
            "peak_beyond_mib": f"peak memory of {names[0]} beyond the gradients, MiB",
        }[kind]


def _median_ratio(top: Sequence[float], bottom: Sequence[float]) -> float:
    return ratio(top, bottom)[0]


def figure_of(
    record: Record,
    figure: tuple[str, ...],
    quotient: Callable[[Sequence[float], Sequence[float]], float] = _median_ratio,
) -> float | None:
    """The figure's value in ``record``; None where a contestant it needs has none. ``quotient``: of two times."""
    kind, *names = figure
    results = [record["results"].get(name, {}) for name in names]
    if kind == "time":
        top, bottom = (result.get("seconds") for result in results)
        return quotient(top, bottom) if top and bottom else None
    if kind.startswith("gradient_error"):
        return results[0].get(kind)
    peaks = [result.get("peak_bytes") for result in results]
    if any(peak is None for peak in peaks):
        return None
    gradient = record["gradient_bytes"]
    if kind == "peak":
        return float(peaks[0] / gradient)
    if kind == "peak_beyond":
        return float((peaks[0] - gradient) / max(peaks[1] - gradient, 1))
    if kind == "peak_beyond_mib":
        return float((peaks[0] - gradient) / 2**20)
    raise ValueError(f"unknown figure {kind!r}")


@dataclass(frozen=True)
class Verdict:
    target: Target
    values: dict[str, float | None]  # by case id
    least: dict[str, float | None]  # of times: the same of each contestant's least sample

    @property
    def worst(self) -> float | None:
        found = [value for value in self.values.values() if value is not None]
        if not found:
            return None
        return max(found) if self.target.op == "<=" else min(found)

    @property
    def status(self) -> str:
        if not self.values or any(value is None for value in self.values.values()):
            if self.worst is not None and not COMPARE[self.target.op](self.worst, self.target.bound):
                return "missed"
            return "not measured"
        assert self.worst is not None
        return "met" if COMPARE[self.target.op](self.worst, self.target.bound) else "missed"

    def as_json(self) -> dict[str, Any]:
        target = self.target
        return {
            "what": target.what,
            "figure": target.figure_text,
            "bound": f"{target.op} {target.bound:g}",
            "worst": self.worst,
            "status": self.status,
            "values": self.values,
            "least": self.least,
        }


def evaluate(records: Iterable[Record], targets: Iterable[Target], machine: dict[str, Any]) -> list[Verdict]:
    """A verdict for each target that applies to ``machine``."""
    records = list(records)
    if has_bf16_instructions(machine):
        targets = [target for target in targets if target.needs != "no-bf16-instructions"]
    found = []
    for target in targets:
        picked = [r for r in records if r["section"] == target.section and target.where(r["case"])]
        timed = picked if target.figure[0] == "time" else []
        found.append(
            Verdict(
                target,
                {record["case"]["id"]: figure_of(record, target.figure) for record in picked},
                {record["case"]["id"]: figure_of(record, target.figure, ratio_of_least) for record in timed},
            )
        )
    return found


def _pick(
    kinds: Iterable[str], dtype: str = "float32", shapes: Iterable[tuple[int, ...]] | None = None, classes: int = 0
) -> Callable[[dict[str, Any]], bool]:
    wanted = None if shapes is None else {tuple(shape) for shape in shapes}
    kinds = set(kinds)

    def where(case: dict[str, Any]) -> bool:
        shape = tuple(case["shape"])
        return (
            case["kind"] in kinds
            and case["dtype"] == dtype
            and (shape in wanted if wanted is not None else True)
            and shape[1] >= classes
        )

    return where


def _from_classes(classes: int) -> Callable[[dict[str, Any]], bool]:
    return lambda case: case["shape"][1] >= classes


INDICES = ("hard", "smoothed")
SPARSE = (*INDICES, "mixup", "topk")
EVERY = (*SPARSE, "soft", "soft+smoothed")


def _versus(
    what: str,
    where: Callable[[dict[str, Any]], bool],
    memcpy: float | None = None,
    eager: float | None = None,
    compile: float | None = None,
    section: str = "logits",
) -> list[Target]:
    """The three columns of the table: at most ``memcpy`` times the memcpy, ``eager`` and ``compile`` times faster."""
    columns = (
        ("softce", "memcpy", "<=", memcpy),
        ("eager", "softce", ">=", eager),
        ("compile", "softce", ">=", compile),
    )
    return [Target(what, section, where, ("time", a, b), op, bound) for a, b, op, bound in columns if bound]


WIDE = [shape for shape in LARGE if shape[1] >= 131072]

LOGITS_TARGETS = [
    *_versus("float32 class indices, C >= 32768", _pick(INDICES, shapes=LARGE), 1.25, 15, 8),
    *_versus("float32 dense + smoothing, C = 32768", _pick(["soft+smoothed"], shapes=[(512, 32768)]), 1.5, 22, 7),
    *_versus("float32 dense + smoothing, C >= 131072", _pick(["soft+smoothed"], shapes=WIDE), 1.7, 22, 7),
    *_versus("float32 class indices, C = 1000", _pick(INDICES, shapes=[(16384, 1000)]), 1.8, 10, 8),
    *_versus("bfloat16 class indices, C >= 32768", _pick(INDICES, "bfloat16", LARGE), 1.9, 7, 5),
    *_versus("bfloat16 dense + smoothing, C >= 32768", _pick(["soft+smoothed"], "bfloat16", LARGE), 2.4, 7, 5),
    *_versus("float32 (65536, 10), (65536, 100)", _pick(EVERY, shapes=[(65536, 10), (65536, 100)]), None, 4, 4),
    *_versus("float32 segmentation, indices", _pick(INDICES, shapes=[(8, 21, 256, 256)]), None, 8, 5),
    *_versus(
        "float32 segmentation, dense", _pick(["soft", "soft+smoothed"], shapes=[(8, 21, 256, 256)]), None, 10, 3.5
    ),
    Target(
        "in place, float32 class indices, C >= 32768",
        "logits",
        _pick(INDICES, shapes=LARGE),
        ("time", "softce-inplace", "memcpy"),
        "<=",
        1.0,
    ),
    Target("(32, 10) against eager", "logits", _pick(EVERY, shapes=[(32, 10)]), ("time", "softce", "eager"), "<=", 1.6),
    Target(
        "gradient against float64, C = 262144, smoothing",
        "logits",
        _pick(["smoothed", "soft+smoothed"], shapes=[(64, 262144), (4, 262144)]),
        ("gradient_error", "softce"),
        "<=",
        1e-6,
    ),
    *_versus("no page faults, C = 32768", _pick(INDICES, shapes=[(512, 32768)]), None, 5.5, section="no-page-faults"),
    Target(
        "two threads, above 2^22 elements", "threads", lambda case: True, ("time", "softce@1", "softce@2"), ">=", 1.5
    ),
    # 5% of one gradient allows for per-row statistics and the rounding of a pool to whole huge pages.
    Target("peak memory, C >= 1000", "memory", _from_classes(1000), ("peak", "softce"), "<=", 1.05),
    Target("peak memory in place, C >= 1000", "memory", _from_classes(1000), ("peak", "softce-inplace"), "<=", 0.05),
]


def _linear(kinds: Iterable[str], dtype: str = "float32", wanted_only: bool = True) -> Callable[[dict[str, Any]], bool]:
    kinds = set(kinds)

    def where(case: dict[str, Any]) -> bool:
        wanted = not wanted_only or ((case["rows"], case["hidden"]) == (1024, 512) and case["classes"] >= 32768)
        return wanted and case["kind"] in kinds and case["dtype"] == dtype

    return where


LINEAR_TARGETS = [
    Target("linear, sparse targets", "linear", _linear(SPARSE), ("time", "softce", "gemms"), "<=", 1.12),
    Target("linear, dense", "linear", _linear(["soft", "soft+smoothed"]), ("time", "softce", "gemms"), "<=", 1.3),
    Target("linear, every shape", "linear", _linear(EVERY, wanted_only=False), ("time", "eager", "softce"), ">=", 1.0),
    Target("linear, class indices", "linear", _linear(["hard"]), ("time", "chunked", "softce"), ">=", 6.0),
    Target("linear, class indices", "linear", _linear(["hard"]), ("time", "chunked-best", "softce"), ">=", 1.0),
    Target(
        "linear, bfloat16 without bfloat16 instructions",
        "linear",
        _linear(EVERY, "bfloat16"),
        ("time", "eager", "softce"),
        ">=",
        25.0,
        needs="no-bf16-instructions",
    ),
    Target(
        "linear, bfloat16 gradients",
        "linear",
        _linear(EVERY, "bfloat16"),
        ("gradient_error_over_rounding", "softce"),
        "<=",
        2.0,
    ),
    Target("linear, peak memory", "linear-memory", _linear(EVERY), ("peak_beyond", "softce", "eager"), "<=", 0.25),
    Target(
        "linear, memory_budget of 16 MiB",
        "linear-memory",
        _linear(EVERY),
        ("peak_beyond_mib", "softce-16MiB"),
        "<=",
        16,
    ),
    Target("linear, memory_budget of 16 MiB", "linear", _linear(EVERY), ("time", "softce-16MiB", "softce"), "<=", 1.5),
]


def _form(what: str, figure: tuple[str, ...], op: str, bound: float, section: str = "forms") -> Target:
    return Target(what, section, lambda case: case["dtype"] == "float32", figure, op, bound)


# A dense target is one more read beside a read and a write: 1.5 times the traffic, and a fifth on top of it.
DENSE_LIMIT = 1.5 * 1.2

FORM_TARGETS = [
    *(_form(f"form: {name}", ("time", name, "hard"), "<=", 1.15) for name in ("smoothed", "mixup", "topk")),
    *(_form(f"form: {name}", ("time", name, "hard"), "<=", DENSE_LIMIT) for name in ("soft", "teacher")),
    *(_form(f"form: {name}", ("time", f"eager-{name}", name), ">=", 8.0) for name in ("soft", "teacher")),
    *(
        _form(f"row loss: {name}", ("time", name, "hard"), "<=", 1.05)
        for name in ("focal", "relaxation", "generalized", "poly1")
    ),
    *(_form(f"form: {name}", ("peak", name), "<=", 1.05, "forms-memory") for name in ("mixup", "topk")),
]

TARGETS = [*LOGITS_TARGETS, *FORM_TARGETS, *LINEAR_TARGETS]
