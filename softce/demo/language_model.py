# SPDX-License-Identifier: BSD-3-Clause
"""Trains a small causal language model on real text, once per loss, same seed: same curve, less time, less memory.

Every contestant runs in a fresh process. The curves are compared step by step, and the demo fails (exit status 1) if
they part by more than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .contestants import contestants, default_names
from .corpus import Corpus, prepare
from .train import Config, Run

VOCABULARY = 32768

# Two runs of the same training that differ in rounding alone drift apart as training amplifies the difference.
# docs/benchmarks.md has the measured drift that these bounds leave room for; they are meant for up to some 200 steps.
FIRST_LOSS = 1e-6  # relative, before any update
FIRST_NORM = 1e-5  # relative, gradient norm before any update
DRIFT = 1e-3  # in nats, the largest difference of the loss at any step
NORM_DRIFT = 1e-3  # relative, the median difference of the gradient norms


@dataclass(frozen=True)
class Agreement:
    """How far a run is from torch's: each figure with its bound."""

    first_loss: float
    first_norm: float
    drift: float
    norm_drift: float

    @property
    def failures(self) -> list[str]:
        """The figures beyond their bounds; nan is beyond every bound."""
        bounds = {"first_loss": FIRST_LOSS, "first_norm": FIRST_NORM, "drift": DRIFT, "norm_drift": NORM_DRIFT}
        values = asdict(self)
        return [f"{key} {values[key]:.2e} > {bound:g}" for key, bound in bounds.items() if not values[key] <= bound]


def compare(truth: Run, run: Run) -> Agreement:
    """How far the losses and gradient norms of ``run`` are from those of ``truth``.

    Raises:
        ValueError: runs of different length, or without a step.
    """
    if len(truth.losses) != len(run.losses) or not run.losses:
        raise ValueError(f"cannot compare runs of {len(truth.losses)} and {len(run.losses)} steps")

    def relative(a: float, b: float) -> float:
        return abs(a - b) / abs(a)

    drifts = [abs(a - b) for a, b in zip(truth.losses, run.losses, strict=True)]
    norms = [relative(a, b) for a, b in zip(truth.gradient_norms, run.gradient_norms, strict=True)]
    return Agreement(
        first_loss=relative(truth.losses[0], run.losses[0]),
        first_norm=norms[0],
        drift=max(drifts) if all(d == d for d in drifts) else float("nan"),
        norm_drift=statistics.median(norms),
    )


def _run_apart(name: str, corpus: Corpus, config: Config, quiet: bool) -> Run:
    """``train`` in a fresh process, so that nothing but this contestant is in its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        job = {"contestant": name, "corpus": asdict(corpus), "config": asdict(config), "quiet": quiet, "out": str(out)}
        subprocess.run([sys.executable, "-m", "softce.demo.train"], input=json.dumps(job), text=True, check=True)
        return Run(**json.loads(out.read_text()))


def _settled(seconds: Sequence[float]) -> float | None:
    """Median over the steps, the first few (pools fill, caches warm) left out."""
    return statistics.median(seconds[3:] or seconds) if seconds else None


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: times in seconds, memory in bytes, and each as a multiple of torch's (the first run's)."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {
            "contestant": run.contestant,
            "label": run.label,
            "kernels": run.kernels,
            "loss_s": _settled(run.loss_seconds),
            "head_and_loss_s": _settled(run.head_seconds),
            "step_s": _settled(run.step_seconds),
            "peak_bytes": run.peak_bytes,
            "last_loss": statistics.mean(run.losses[-5:]),
            "held_out_loss": run.held_out_loss,
        }
        first = rows[0] if rows else row
        for key in ("loss_s", "head_and_loss_s", "step_s", "peak_bytes"):
            row[f"torch_over_{key}"] = first[key] / row[key] if row[key] else None
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary for the terminal."""

    def cell(row: dict[str, Any], key: str, scale: float) -> str:
        if row[key] is None:
            return "-"
        return f"{row[key] * scale:.1f} ({row[f'torch_over_{key}']:.1f}x)"

    columns = {"loss ms": ("loss_s", 1e3), "head+loss ms": ("head_and_loss_s", 1e3), "step ms": ("step_s", 1e3)}
    columns["peak MiB"] = ("peak_bytes", 2**-20)
    lines = [["", *columns, "last loss", "held-out loss"]]
    for row in rows:
        cells = [cell(row, key, scale) for key, scale in columns.values()]
        lines.append([row["label"], *cells, f"{row['last_loss']:.4f}", f"{row['held_out_loss']:.4f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def plot(runs: Sequence[Run], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss curves, their difference from torch's, time of the loss and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    (curves, apart), (times, memory) = grid
    for index, run in enumerate(runs):
        curves.plot(run.losses, label=run.label, linewidth=max(1.0, 4 - 1.5 * index), alpha=0.8)
        if index:
            floor = [max(abs(a - b), 1e-9) for a, b in zip(runs[0].losses, run.losses, strict=True)]
            apart.semilogy(floor, color=f"C{index}", label=run.label)
    curves.set(xlabel="step", ylabel="training loss, nats per token")
    curves.legend(fontsize=8)
    apart.axhline(DRIFT, color="grey", linestyle=":", label="bound")
    apart.set(xlabel="step", ylabel="difference from torch's curve")
    apart.legend(fontsize=8)
    names = [row["label"] for row in rows]
    colours = [f"C{index}" for index in range(len(rows))]
    times.barh(names, [row["head_and_loss_s"] * 1e3 for row in rows], color=colours, alpha=0.35, label="output layer")
    times.barh(names, [(row["loss_s"] or 0.0) * 1e3 for row in rows], color=colours, label="loss alone")
    times.set(xlabel="output layer + loss, forward and backward, ms (dark: the loss alone)")
    memory.barh(names, [row["peak_bytes"] / 2**20 for row in rows], color=colours)
    memory.set(xlabel="peak memory of the training loop, MiB")
    for axes in (times, memory):
        axes.invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    defaults = Config(steps=80, seconds=50.0)
    parse = argparse.ArgumentParser(prog="softce demo language-model", description=__doc__)
    parse.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of results and cached tokens")
    parse.add_argument("--corpus", type=Path, help="a folder of text instead of the standard library's source")
    parse.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parse.add_argument("--contestants", nargs="+", default=None, metavar="NAME", help=f"of {', '.join(contestants())}")
    parse.add_argument("--quiet", action="store_true", help="no progress bars")
    for name, value in asdict(defaults).items():
        parse.add_argument(f"--{name}", type=type(value), default=value)
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if all curves agree with torch's, 1 if one does not."""
    arguments = parser().parse_args(argv)
    config = Config(**{name: getattr(arguments, name) for name in asdict(Config(steps=1, seconds=0))})
    names = arguments.contestants or default_names()
    unknown = [name for name in names if name not in contestants()]
    if unknown:
        print(f"softce demo: no contestant is called {unknown[0]!r}: {', '.join(contestants())}", file=sys.stderr)
        return 2
    if names[0] != "torch":
        names = ["torch", *(name for name in names if name != "torch")]
    began = time.perf_counter()
    corpus = prepare(arguments.out, arguments.vocabulary, arguments.corpus, arguments.quiet)
    rows_per_step = config.batch * config.length
    print(
        f"corpus: {corpus.files} files, {corpus.text_bytes / 1e6:.1f} MB, {corpus.tokens / 1e6:.2f} million tokens, "
        f"vocabulary {corpus.vocabulary}\n"
        f"one step: {rows_per_step} tokens; their logits take "
        f"{rows_per_step * corpus.vocabulary * 4 / 2**20:.0f} MiB in float32",
        flush=True,
    )
    runs: list[Run] = []
    for name in names:
        runs.append(_run_apart(name, corpus, config, arguments.quiet))
        # Torch's run, the slowest, decides how many steps there is time for.
        config = Config(**{**asdict(config), "steps": len(runs[0].losses), "seconds": 0.0})
    agreements = {run.contestant: compare(runs[0], run) for run in runs[1:]}
    rows = summary(runs)
    document = {
        "torch": torch.__version__,
        "corpus": asdict(corpus),
        "config": asdict(config),
        "summary": rows,
        "agreement": {name: asdict(agreement) for name, agreement in agreements.items()},
        "runs": [asdict(run) for run in runs],
    }
    (arguments.out / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(runs, rows, arguments.out / "demo.png")
    print("\n" + table(rows) + "\n")
    print("loss: forward and backward of the loss alone; peak: above the model, its optimizer and the tokens.")
    return _verdict(agreements, runs, arguments.out, time.perf_counter() - began)


def _verdict(agreements: dict[str, Agreement], runs: Sequence[Run], out: Path, elapsed: float) -> int:
    """Says whether the curves agree, and what to mistrust."""
    failed = False
    for name, found in agreements.items():
        failed |= bool(found.failures)
        word = f"DO NOT AGREE ({', '.join(found.failures)})" if found.failures else "agree"
        print(
            f"{name} and torch {word}: over {len(runs[0].losses)} steps the loss differs by at most "
            f"{found.drift:.1e} nats; at the first step by {found.first_loss:.1e}, its gradient norm by "
            f"{found.first_norm:.1e} (relative)."
        )
    for run in runs:
        if run.kernels.startswith("plain PyTorch"):
            print(f"note: {run.contestant} ran on {run.kernels}; its time says nothing about the kernels.")
        if not run.peak_exact:
            print(f"note: the peak memory of {run.contestant} may contain what came before its training loop.")
    print(f"results: {out / 'demo.json'}, {out / 'demo.png'} ({elapsed:.0f} s)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
