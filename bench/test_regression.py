# SPDX-License-Identifier: BSD-3-Clause
"""Times of softce alone, kept from commit to commit by pytest-benchmark. Not part of the ordinary tests.

    python -m pytest bench/test_regression.py --benchmark-autosave
    python -m pytest bench/test_regression.py --benchmark-compare --benchmark-compare-fail=median:15%

Absolute times compare only on one idle machine; ``python -m bench`` is the side-by-side with torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import adapters, linear
from .cases import Case, make_inputs
from .linear import LinearCase

pytest.importorskip("pytest_benchmark")

CASES = [
    Case((256, 10), "float32", "hard"),
    Case((65536, 10), "float32", "smoothed"),
    Case((8192, 1000), "float32", "hard"),
    Case((512, 32768), "float32", "smoothed"),
    Case((512, 32768), "float32", "soft+smoothed"),
    Case((512, 32768), "bfloat16", "smoothed"),
    Case((128, 131072), "float32", "soft+smoothed"),
    Case((8, 21, 256, 256), "float32", "hard"),
]
LINEAR_CASES = [LinearCase(1024, 512, 32768, kind=kind) for kind in ("hard", "soft+smoothed")]


def _time(benchmark: Any, name: str, inputs: Any, registry: dict[str, adapters.Adapter]) -> None:
    torch.set_num_threads(1)
    found, skipped = adapters.entries([name], inputs, registry)
    if skipped:
        pytest.skip(skipped[name])
    (entry,) = found
    entry.before()
    benchmark(entry.run)
    entry.after()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_cross_entropy(benchmark: Any, case: Case) -> None:
    _time(benchmark, "softce", make_inputs(case), adapters.ADAPTERS)


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.id)
def test_linear_cross_entropy(benchmark: Any, case: LinearCase) -> None:
    _time(benchmark, "softce", linear.make_inputs(case), linear.ADAPTERS)
