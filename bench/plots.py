# SPDX-License-Identifier: BSD-3-Clause
"""Plots made from the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapters import SPIN
from .measure import Record
from .timer import ratio

COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#4c72b0",
    "softce": "#c44e52",
    "softce-inplace": "#e39a5b",
    "chunked": "#55a868",
    "chunked-best": "#8172b3",
}


def draw(document: dict[str, Any], folder: Path) -> list[str]:
    """Writes the plots that the records allow; the names of the files."""
    import matplotlib

    matplotlib.use("Agg")
    records = document["records"]
    made = []
    for dtype in ("float32", "bfloat16"):
        group = [r for r in records if r["section"] == "logits" and r["case"]["dtype"] == dtype]
        if group:
            title = f"time, as a multiple of the memcpy of the logits ({dtype})"
            made.append(_panels(group, "memcpy", title, folder / f"time-{dtype}.png"))
    linear = [r for r in records if r["section"] == "linear"]
    if linear:
        title = "time, as a multiple of the three matrix products alone"
        made.append(_panels(linear, "gemms", title, folder / "time-linear.png"))
    for section in ("memory", "linear-memory"):
        group = [r for r in records if r["section"] == section]
        if group:
            made.append(_memory(group, folder / f"{section}.png"))
    return made


def _names(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(n for r in records for n, found in r["results"].items() if key in found))


def _bars(axes: Any, labels: list[str], series: dict[str, list[float | None]]) -> None:
    width = 0.8 / max(len(series), 1)
    for position, (name, values) in enumerate(series.items()):
        at = [i + (position - (len(series) - 1) / 2) * width for i, value in enumerate(values) if value is not None]
        axes.bar(at, [v for v in values if v is not None], width, label=name, color=COLOURS.get(name))
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", fontsize=7)


def _panels(records: Sequence[Record], base: str, title: str, path: Path) -> str:
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(r["case"]["kind"] for r in records))
    names = [name for name in _names(records, "seconds") if name not in (base, SPIN)]
    figure, grid = plt.subplots(len(kinds), 1, figsize=(9, 2.6 * len(kinds)), squeeze=False, layout="constrained")
    for axes, kind in zip(grid[:, 0], kinds, strict=True):
        group = [r for r in records if r["case"]["kind"] == kind and r["results"].get(base, {}).get("seconds")]
        series: dict[str, list[float | None]] = {
            name: [
                ratio(r["results"][name]["seconds"], r["results"][base]["seconds"])[0]
                if r["results"].get(name, {}).get("seconds")
                else None
                for r in group
            ]
            for name in names
        }
        _bars(axes, [r["case"]["label"] for r in group], series)
        if group:
            axes.set_yscale("log")
        axes.axhline(1.0, color="black", linewidth=0.6)
        axes.set_title(kind, fontsize=9)
    grid[0, 0].legend(fontsize=7, ncols=4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name


def _memory(records: Sequence[Record], path: Path) -> str:
    import matplotlib.pyplot as plt

    names = _names(records, "peak_bytes")
    series = {
        name: [
            r["results"][name]["peak_bytes"] / r["gradient_bytes"]
            if r["results"].get(name, {}).get("peak_bytes") is not None
            else None
            for r in records
        ]
        for name in names
    }
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    _bars(axes, [r["case"]["id"] for r in records], series)
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_ylabel("peak memory / gradients")
    axes.legend(fontsize=7, ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name
