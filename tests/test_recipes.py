# SPDX-License-Identifier: BSD-3-Clause
"""Runs every code block of docs/recipes.md as it stands, and the calibration demo's main."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parent.parent / "docs" / "recipes.md"


def _blocks() -> list[tuple[str, int, str]]:
    """Title, first line and code of each block."""
    found, title, code, start = [], "", None, 0
    for number, line in enumerate(RECIPES.read_text().splitlines(), 1):
        if line.startswith("## "):
            title = line[3:]
        elif line == "```python":
            code, start = [], number
        elif line == "```" and code is not None:
            found.append((title, start, "\n".join(code) + "\n"))
            code = None
        elif code is not None:
            code.append(line)
    return found


BLOCKS = _blocks()


def test_every_subject_has_a_recipe() -> None:
    titles = " | ".join(title.lower() for title, _, _ in BLOCKS)
    for subject in (
        "binary",
        "multi-class",
        "imbalanced",
        "by hand",
        "relaxation",
        "top-k",
        "mixup",
        "calibration",
        "keras",
    ):
        assert subject in titles, f"no recipe about {subject}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"{re.sub('[^a-z]+', '-', t.lower())}-line-{n}" for t, n, _ in BLOCKS])
def test_recipe(block: tuple[str, int, str]) -> None:
    title, line, code = block
    os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras is imported
    for package in ("keras", "sklearn"):
        if package in code:
            pytest.importorskip(package)
    if "demo.calibration" in code:
        pytest.importorskip("sklearn")
    if "keras" in code and sys.modules["keras"].backend.backend() != "torch":
        pytest.skip("Keras does not run on its torch backend")
    exec(compile("\n" * line + code, str(RECIPES), "exec"), {"__name__": f"recipe: {title}"})


def test_calibration_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    from softce.demo import calibration

    plot = tmp_path / "plots" / "reliability.png"
    assert calibration.main(["--epochs", "2", "--seeds", "1", "--out", str(plot)]) == 0
    printed = capsys.readouterr().out
    for name in calibration.LOSSES:
        assert name in printed
    assert plot.stat().st_size > 5000 and plot.read_bytes()[:4] == b"\x89PNG"


def test_expected_calibration_error() -> None:
    from softce.demo.calibration import reliability

    prob = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    error, bins = reliability(prob, torch.tensor([0, 1, 1, 1]))
    assert error == pytest.approx(0.5 * (0.95 - 0.5) + 0.5 * (1.0 - 0.65))
    assert [round(share, 6) for _, _, share in bins] == [0.5, 0.5]
    assert sum(share for _, _, share in bins) == pytest.approx(1.0)
