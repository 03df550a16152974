# SPDX-License-Identifier: BSD-3-Clause
"""Tables, verdicts and plots of a GPU run, made from its JSON document and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .report import MISSING, mib, number, table

Document = dict[str, Any]
Record = dict[str, Any]
GIB = 2**30


def median(record: Record, name: str) -> float | None:
    """Milliseconds."""
    value = record["results"].get(name, {}).get("median_ms")
    return None if value is None else float(value)


def share_of_copy(record: Record, name: str) -> float | None:
    """Bandwidth of the least bytes, over that of the copy in the same rounds."""
    time, copy = median(record, name), median(record, "copy")
    if time is None or copy is None:
        return None
    copied = 2 * record["shape"]["rows"] * record["shape"]["classes"] * _element(record)
    return float(record["bytes"] / time / (copied / copy))


def _element(record: Record) -> int:
    return {"float32": 4, "float64": 8}.get(record["shape"]["dtype"], 2)


def times_slower(record: Record, name: str, than: str) -> float | None:
    time, base = median(record, name), median(record, than)
    return None if time is None or base is None else time / base


# ---- the figures to reach ----


class Figure(NamedTuple):
    """A bound on a number of a record: ``at_least`` or at most."""

    what: str
    section: str
    value: Callable[[Record], float | None]
    bound: float
    at_least: bool = True
    strict: bool = False


def _best(record: Record) -> str:
    """The faster of softce's two backends."""
    found = {name: median(record, name) for name in ("softce-cuda", "softce-triton")}
    known = {name: time for name, time in found.items() if time is not None}
    return min(known, key=lambda name: known[name]) if known else "softce-triton"


FIGURES = (
    Figure("CUDA C++, share of copy bandwidth", "indices", lambda r: share_of_copy(r, "softce-cuda"), 0.90),
    Figure("Triton, share of copy bandwidth", "indices", lambda r: share_of_copy(r, "softce-triton"), 0.75),
    *(
        Figure(
            f"{peer} is slower by", "indices", lambda r, peer=peer: times_slower(r, peer, _best(r)), 1.0, strict=True
        )
        for peer in ("quack", "liger")
    ),
    Figure("share of copy bandwidth", "dense", lambda r: share_of_copy(r, _best(r)), 0.88),
    Figure("eager is slower by", "dense", lambda r: times_slower(r, "eager", _best(r)), 5.0),
    Figure("torch.compile is slower by", "dense", lambda r: times_slower(r, "compile", _best(r)), 2.0),
    Figure("time over the three GEMMs", "linear", lambda r: times_slower(r, "softce", "gemms"), 1.15, at_least=False),
    *(
        Figure(f"{p} is slower by", "linear", lambda r, p=p: times_slower(r, p, "softce"), 1.0, strict=True)
        for p in ("liger", "cce", "quack")
    ),
    Figure("GiB beyond inputs and gradients", "linear", lambda r: _linear_extra(r), 1.0, at_least=False, strict=True),
)
FIGURE_SHAPES = ((8192, 32768), (8192, 128256), (4096, 256000))


def _linear_extra(record: Record) -> float | None:
    peak = record["results"].get("softce", {}).get("peak_bytes")
    if peak is None:
        return None
    shape = record["shape"]
    gradients = (shape["rows"] + shape["classes"]) * shape["hidden"] * _element(record)
    return float((peak - gradients) / GIB)


def verdicts(document: Document) -> list[dict[str, Any]]:
    """Each figure on each of its shapes: met, missed or not measured."""
    found = []
    for record in document["records"]:
        shape = record["shape"]
        if shape["dtype"] != "bfloat16" or (shape["rows"], shape["classes"]) not in FIGURE_SHAPES:
            continue
        for figure in FIGURES:
            if figure.section != shape["section"]:
                continue
            value = figure.value(record)
            found.append({"what": figure.what, "shape": record["name"], "bound": _bound(figure), "value": value,
                          "status": _status(figure, value)})  # fmt: skip
    return found


def _bound(figure: Figure) -> str:
    sign = (">" if figure.at_least else "<") + ("" if figure.strict else "=")
    return f"{sign} {figure.bound:g}"


def _status(figure: Figure, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "not measured"
    if value == figure.bound:
        return "missed" if figure.strict else "met"
    return "met" if (value > figure.bound) == figure.at_least else "missed"


# ---- text ----


def _state(found: dict[str, Any]) -> str | None:
    """Why there is no time, if there is none."""
    return found.get("skipped") or found.get("error")


def timing_table(records: Iterable[Record]) -> str:
    rows = []
    for record in records:
        base = "gemms" if record["shape"]["section"] == "linear" else "copy"
        for name, found in record["results"].items():
            time = median(record, name)
            if time is None:
                rows.append([record["name"], name, _state(found) or MISSING, *[MISSING] * 5])
                continue
            rows.append([
                record["name"],
                f"{name} {found['version']}" if found.get("version") else name,
                f"{time:.3f}",
                number(times_slower(record, name, base)),
                MISSING if base == "gemms" else f"{record['bytes'] / time / 1e6:.0f}",
                MISSING if share_of_copy(record, name) is None else f"{100 * share_of_copy(record, name):.0f}%",  # type: ignore[operator]
                mib(found.get("peak_bytes")),
                number(found.get("gradient_error"), 2),
            ])  # fmt: skip
    head = ("shape", "contestant", "ms", "over copy or GEMMs", "GB/s", "of copy", "peak MiB", "gradient error")
    return table(head, rows)


def markdown(document: Document, plots: Iterable[str] = ()) -> str:
    """The whole report."""
    facts = table(
        ("fact", "value"), [(key.replace("_", " "), str(value)) for key, value in document["machine"].items()]
    )
    checks = table(
        ("check", "result", "details"),
        [(name, found["status"], found.get("detail", "")) for name, found in document["checks"].items()],
    )
    judged = table(
        ("figure", "shape", "to reach", "measured", ""),
        [(v["what"], v["shape"], v["bound"], number(v["value"]), v["status"]) for v in verdicts(document)],
    )
    parts = [
        f"# {document['machine']['gpu']}",
        "Made by `python -m bench.gpu`. Forward and backward of a mean, medians of interleaved rounds, cold L2. GB/s "
        "count the least bytes: one read of the logits and one write of their gradient, one more of a dense target.",
        facts,
        "## Checks",
        checks,
        "## Figures to reach",
        judged,
        "## Times",
        timing_table(document["records"]),
        *(f"![{Path(plot).stem}]({plot})" for plot in plots),
    ]
    return "\n\n".join(parts) + "\n"


def draw(document: Document, folder: Path) -> list[str]:
    """One plot a section; the names of the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for section in dict.fromkeys(record["shape"]["section"] for record in document["records"]):
        records = [record for record in document["records"] if record["shape"]["section"] == section]
        base = "gemms" if section == "linear" else "copy"
        names = [n for n in dict.fromkeys(n for r in records for n in r["results"]) if n != base]
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        width = 0.8 / max(len(names), 1)
        for position, name in enumerate(names):
            bars = [(i, times_slower(record, name, base)) for i, record in enumerate(records)]
            at = [i + (position - (len(names) - 1) / 2) * width for i, value in bars if value is not None]
            axes.bar(at, [value for _, value in bars if value is not None], width, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(records)), [record["name"] for record in records], fontsize=7)
        axes.set_ylabel("time over the GEMMs alone" if base == "gemms" else "time over copy_ of the logits")
        axes.set_yscale("log")
        axes.legend(fontsize=7)
        axes.set_title(f"{document['machine']['gpu']}: {section}")
        name = f"{section}.png"
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)
        made.append(name)
    return made


def faster_entries(document: Document) -> list[str]:
    """Lines for ``softce/backends/gpu.py: FASTER``: where CUDA C++ beat Triton, for numbers of classes around it."""
    lines = []
    capability = tuple(document["machine"]["capability"])
    for record in document["records"]:
        shape = record["shape"]
        cuda, triton = median(record, "softce-cuda"), median(record, "softce-triton")
        if shape["section"] == "linear" or cuda is None or triton is None or cuda >= triton:
            continue
        around = f"range({shape['classes'] * 3 // 4}, {shape['classes'] * 4 // 3})"
        lines.append(
            f'Faster("row_fused", {capability}, torch.{shape["dtype"]}, {shape["section"] == "dense"}, {around}),'
            f"  # {triton / cuda:.2f}x at {record['name']}"
        )
    return lines
