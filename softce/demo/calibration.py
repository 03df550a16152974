# SPDX-License-Identifier: BSD-3-Clause
"""What soft labels do to confidence and calibration: scikit-learn's handwritten digits, one small network per loss.

Each loss trains the same network from the same start on the same batches, over several seeds; ``--noise`` makes some of
the training labels wrong. Reported on held-out digits: accuracy, mean confidence, expected calibration error
(the mean gap between confidence and accuracy over bins of equal width, weighted by their share; Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017) and negative log-likelihood; and a reliability plot.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import softce

BINS = 10

# name: the arguments of softce.cross_entropy
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing 0.1": {"label_smoothing": 0.1},
    "smoothing 0.02": {"label_smoothing": 0.02},
    "focal, gamma 2": {"row_loss": softce.Focal(2.0)},
    "relaxation 0.1": {"row_loss": softce.LabelRelaxation(0.1)},
}


@dataclass
class Result:
    """Held-out figures of one loss, from the pooled predictions of all seeds."""

    name: str
    accuracy: float
    confidence: float
    calibration_error: float
    log_loss: float
    bins: list[tuple[float, float, float]]  # mean confidence, accuracy, share of the samples


def reliability(prob: Tensor, label: Tensor, bins: int = BINS) -> tuple[float, list[tuple[float, float, float]]]:
    """Expected calibration error of ``prob`` (N, C) against ``label`` (N,), and what its non-empty bins hold."""
    confidence, predicted = prob.max(1)
    hit = (predicted == label).double()
    which = (confidence * bins).long().clamp(0, bins - 1)
    found, error = [], 0.0
    for b in range(bins):
        inside = which == b
        if not inside.any():
            continue
        conf, acc = float(confidence[inside].double().mean()), float(hit[inside].mean())
        share = float(inside.double().mean())
        found.append((conf, acc, share))
        error += share * abs(conf - acc)
    return error, found


def _digits(seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, a share ``noise`` of them random, and held-out ones: half of the digits each."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    data = load_digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=g)
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16.0
    y = torch.tensor(data.target, dtype=torch.int64)[order]
    half = len(y) // 2
    wrong = torch.rand(half, generator=g) < noise
    given = torch.where(wrong, torch.randint(10, (half,), generator=g), y[:half])
    return x[:half], given, x[half:], y[half:]


def train(
    arguments: dict[str, Any], seed: int, epochs: int, noise: float = 0.0, tick: Callable[[], Any] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Held-out probabilities and labels of a network trained with ``softce.cross_entropy(.., **arguments)``."""
    x, y, held_out, label = _digits(seed, noise)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(64):
            loss = softce.cross_entropy(model(x[batch]), y[batch], **arguments)
            assert isinstance(loss, Tensor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tick()
    with torch.no_grad():
        return torch.softmax(model(held_out), 1), label


def evaluate(name: str, prob: Tensor, label: Tensor) -> Result:
    """The figures of held-out predictions."""
    error, bins = reliability(prob, label)
    accuracy = float((prob.argmax(1) == label).double().mean())
    log_loss = float(-torch.log(prob[torch.arange(len(label)), label].clamp_min(1e-12)).double().mean())
    return Result(name, accuracy, float(prob.max(1).values.double().mean()), error, log_loss, bins)


def plot(results: list[Result], path: Path) -> None:
    """A reliability diagram for each loss: accuracy over confidence, the bars as wide as their bins."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3.2 * len(results), 3.6), sharey=True, squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        conf, acc, share = (list(column) for column in zip(*result.bins, strict=True))
        axis.bar(conf, acc, width=0.8 / BINS, color="tab:blue", alpha=0.35)
        axis.plot(conf, acc, marker="o", color="tab:blue", label="accuracy")
        axis.bar(conf, share, width=0.25 / BINS, color="tab:orange", label="share of samples")
        figures = f"ECE {100 * result.calibration_error:.1f}%, accuracy {100 * result.accuracy:.1f}%"
        axis.set_title(f"{result.name}\n{figures}")
        axis.set_xlabel("confidence")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][0].legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(results: list[Result]) -> str:
    """The figures as text."""
    lines = [f"{'loss':16s} {'accuracy':>9s} {'confidence':>11s} {'ECE':>7s} {'log-loss':>9s}"]
    lines += [
        f"{r.name:16s} {100 * r.accuracy:8.2f}% {100 * r.confidence:10.2f}% {100 * r.calibration_error:6.2f}% "
        f"{r.log_loss:9.4f}"
        for r in results
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m softce demo calibration [OPTIONS]``."""
    parser = argparse.ArgumentParser(
        prog="python -m softce demo calibration",
        description="Accuracy, calibration and a reliability plot with and without soft labels, on real digits.",
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="networks trained with each loss (default: 3)")
    parser.add_argument("--noise", type=float, default=0.0, help="share of random training labels (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("calibration.png"), help="where the plot goes")
    options = parser.parse_args(argv)
    if options.epochs < 1 or options.seeds < 1 or not 0.0 <= options.noise < 1.0:
        parser.error("--epochs and --seeds must be positive, --noise in [0, 1)")

    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for each other
    results = []
    with tqdm(total=len(LOSSES) * options.seeds * options.epochs, unit="epoch", mininterval=0.5) as bar:
        for name, arguments in LOSSES.items():
            bar.set_description(name)
            runs = [train(arguments, seed, options.epochs, options.noise, bar.update) for seed in range(options.seeds)]
            prob, label = (torch.cat(parts) for parts in zip(*runs, strict=True))
            results.append(evaluate(name, prob, label))
    torch.set_num_threads(threads)
    held_out = f"{options.seeds} x {len(label) // options.seeds} held-out digits"
    print(f"\n{held_out}, {100 * options.noise:g}% of the training labels random, {options.epochs} epochs\n")
    print(table(results))
    plot(results, options.out)
    print(f"\nreliability plot: {options.out}")
    return 0
