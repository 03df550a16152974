# SPDX-License-Identifier: BSD-3-Clause
"""Tables in Markdown, made from the JSON file and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .adapters import BARE, SPIN
from .measure import Record
from .timer import ratio

Document = dict[str, Any]
MISSING = "-"
SPIN_NOTE = (
    f"`{SPIN}` is a fixed loop of arithmetic in the first-level cache. Where its time lies clearly above the least of "
    "all cases of the run, something else had a part of the core."
)
TITLES = {
    "logits": "Logits: end to end, one thread, default environment",
    "no-page-faults": "Logits: page faults taken out of every contestant",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if value * s >= 1), ("us", 1e6))
    return f"{value * scale:.3g} {unit}"


def mib(value: float | None) -> str:
    return MISSING if value is None else f"{value / 2**20:.1f}"


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:.{digits}g}"


def result(record: Record, name: str, key: str) -> Any:
    return record["results"].get(name, {}).get(key)


def times(record: Record, name: str, base: str) -> str:
    """``name``'s time as a multiple of ``base``'s: median of the rounds, with its quartiles where they differ."""
    top, bottom = result(record, name, "seconds"), result(record, base, "seconds")
    if not top or not bottom:
        return "failed" if result(record, name, "error") else MISSING
    middle, low, high = ratio(top, bottom)
    spread = f" ({low:.2f} to {high:.2f})" if high - low > 0.05 * middle else ""
    return f"{middle:.2f}{spread}"


def _contestants(records: Iterable[Record]) -> list[str]:
    """Every contestant that was to run, in the order of first appearance."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(name for name, found in record["results"].items() if "skipped" not in found))
    return list(names)


def _shape(record: Record) -> str:
    return " x ".join(map(str, record["case"]["shape"]))


def machine_block(document: Document) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {part}" for key, part in value.items())
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    facts = {**document["machine"], **document["settings"]}
    return table(("fact", "value"), [(key.replace("_", " "), text(value)) for key, value in facts.items()])


def targets_block(document: Document) -> str:
    def spread(values: Iterable[float | None]) -> str:
        measured = sorted({value for value in values if value is not None})
        return " to ".join(map(number, measured[:1] + measured[1:][-1:])) or MISSING

    rows = [
        (
            verdict["what"],
            verdict["figure"],
            verdict["bound"],
            spread(verdict["values"].values()),
            spread(verdict["least"].values()),
            verdict["status"],
        )
        for verdict in document["targets"]
    ]
    counts = Counter(verdict["status"] for verdict in document["targets"])
    summary = ", ".join(f"{counts[status]} {status}" for status in ("met", "missed", "not measured"))
    return f"{summary}.\n\n" + table(("what", "figure", "to reach", "measured", "of the least times", ""), rows)


def timing_block(records: Sequence[Record]) -> str:
    """One table a dtype and kind of target."""
    parts = []
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["case"]["dtype"], record["case"]["kind"]), []).append(record)
    for (dtype, kind), group in groups.items():
        names = [name for name in _contestants(group) if name not in BARE]
        head = ["shape", "memcpy", *(f"{name} / memcpy" for name in names), "eager / softce", "compile / softce"]
        head += ["least traffic / memcpy", "softce GB/s", "gradient error: eager", "compile", "softce"]
        rows = [
            [
                _shape(record),
                seconds(result(record, "memcpy", "median_s")),
                *(times(record, name, "memcpy") for name in names),
                times(record, "eager", "softce"),
                times(record, "compile", "softce"),
                number(record["bytes"]["least_over_memcpy"]),
                number(result(record, "softce", "least_gb_per_s")),
                *(number(result(record, name, "gradient_error"), 2) for name in ("eager", "compile", "softce")),
            ]
            for record in group
        ]
        parts.append(f"### {dtype}, {kind}\n\n" + table(head, rows))
    return "\n\n".join(parts)


def absolute_block(records: Sequence[Record]) -> str:
    """Median time of a call, its spread, and the page faults it takes."""
    names = _contestants(records)
    rows = []
    for record in records:
        cells = []
        for name in names:
            median = result(record, name, "median_s")
            if median is None:
                cells.append(MISSING)
                continue
            low, spread = result(record, name, "min_s"), result(record, name, "iqr_s")
            cells.append(
                f"{seconds(median)} (min {seconds(low)}, IQR {seconds(spread)}, "
                f"{result(record, name, 'page_faults'):.0f} faults)"
            )
        rows.append([record["case"]["id"], *cells])
    return table(["case", *names], rows)


def threads_block(records: Sequence[Record]) -> str:
    names = _contestants(records)
    first: dict[str, str] = {}  # of each contestant, at the fewest threads
    for name in names:
        first.setdefault(name.partition("@")[0], name)
    gains = [(first[name.partition("@")[0]], name) for name in names if name not in first.values()]
    rows = [
        [
            record["case"]["id"],
            *(seconds(result(record, name, "median_s")) for name in names),
            *(times(record, one, several) for one, several in gains),
        ]
        for record in records
    ]
    return table(["case", *names, *(f"{one} / {several}" for one, several in gains)], rows)


def memory_block(records: Sequence[Record]) -> str:
    names = _contestants(records)
    rows = []
    for record in records:
        peaks = (mib(result(record, name, "peak_bytes")) for name in names)
        rows.append([record["case"]["id"], mib(record["gradient_bytes"]), *peaks])
    return table(["case", "gradients MiB", *(f"{name} MiB" for name in names)], rows)


def forms_block(timed: Sequence[Record], memory: Sequence[Record]) -> str:
    """A row for every form: its time against class indices, and eager's against it."""
    parts = []
    for record in timed:
        forms = [name for name in _contestants([record]) if not name.startswith("eager-")]
        rows = [
            (
                name,
                seconds(result(record, name, "median_s")),
                times(record, name, "hard"),
                times(record, f"eager-{name}", name),
            )
            for name in forms
        ]
        title = f"### {_shape(record)}, {record['case']['dtype']}"
        parts.append(f"{title}\n\n" + table(("form", "softce", "softce / class indices", "eager / softce"), rows))
    if memory:
        parts.append("Peak memory of one call:\n\n" + memory_block(memory))
    return "\n\n".join(parts)


def linear_block(timed: Sequence[Record], memory: Sequence[Record]) -> str:
    """Time against the three matrix products alone, then memory."""
    parts = []
    if timed:
        names = [name for name in _contestants(timed) if name != "gemms"]
        head = ["N x H x V", "dtype", "kind", "products", *(f"{name} / products" for name in names)]
        head += ["eager / softce", "gradient error: eager", "softce", "chunk of chunked-best"]
        rows = [
            [
                record["case"]["label"],
                record["case"]["dtype"],
                record["case"]["kind"],
                seconds(result(record, "gemms", "median_s")),
                *(times(record, name, "gemms") for name in names),
                times(record, "eager", "softce"),
                *(number(result(record, name, "gradient_error"), 2) for name in ("eager", "softce")),
                result(record, "chunked-best", "note") or MISSING,
            ]
            for record in timed
        ]
        parts.append(table(head, rows))
    if memory:
        parts.append("Peak memory of one call, the gradients included:\n\n" + memory_block(memory))
    return "\n\n".join(parts)


def failures_block(records: Sequence[Record]) -> str:
    """What has no figure and why, one line a reason: an error first, then what cannot run at all."""
    cases: dict[tuple[str, str, str, str], list[str]] = {}
    for word in ("error", "skipped"):
        for record in records:
            for name, found in record["results"].items():
                if word in found:
                    cases.setdefault((word, record["section"], name, found[word]), []).append(record["case"]["id"])
    rows = [(word, section, name, f"{len(ids)}: {ids[0]}", why) for (word, section, name, why), ids in cases.items()]
    return table(("", "section", "contestant", "cases", "why"), rows) if rows else "Everything ran."


def markdown(document: Document, plots: Sequence[str] = ()) -> str:
    def of(*sections: str) -> list[Record]:
        return [record for record in document["records"] if record["section"] in sections]

    parts = ["# Benchmark of softce", machine_block(document)]
    parts += ["## Figures to reach", targets_block(document)]
    timed = [record for record in document["records"] if "bytes" in record]
    for section in dict.fromkeys(record["section"] for record in timed):
        parts += [f"## {TITLES.get(section, section)}", timing_block(of(section))]
    if of("threads"):
        parts += ["## Threads", threads_block(of("threads"))]
    if of("memory"):
        parts += ["## Peak memory of one call, fresh process each", memory_block(of("memory"))]
    if of("forms", "forms-memory"):
        parts += ["## Target forms and row losses", forms_block(of("forms"), of("forms-memory"))]
    if of("linear", "linear-memory"):
        parts += ["## Fused linear", linear_block(of("linear"), of("linear-memory"))]
    parts += [f"![{name}]({name})" for name in plots]
    if timed:
        note = [SPIN_NOTE] if any(SPIN in record["results"] for record in timed) else []
        parts += ["## Time of a call", *note, absolute_block(timed)]
    parts += ["## What did not run", failures_block(document["records"])]
    return "\n\n".join(parts) + "\n"
