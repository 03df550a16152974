# SPDX-License-Identifier: BSD-3-Clause
"""Times candidate configurations of the Triton row kernel: what ``softce/backends/triton_configs.py`` is made from."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from softce.backends import triton as backend
from softce.backends import triton_configs as configs
from softce.backends.triton_configs import Config
from softce.ops import KernelTarget, Spec

CLASSES = (1000, 4096, 16384, 32768, 50257, 128256, 256000)
ELEMENTS = 2**29
ROUNDS = 15


def candidates(classes: int) -> Iterator[Config]:
    """Blocks that hold the row and blocks that sweep it, over warps, stages and programs a multiprocessor."""
    whole = configs.power_of_two(classes)
    blocks = [block for block in (1024, 2048, 4096, 8192, 16384, whole) if block <= min(whole, 32768)]
    for block, warps in itertools.product(dict.fromkeys(blocks), (4, 8, 16, 32)):
        if not 4 <= block // (32 * warps) <= 64:
            continue
        if block >= classes:
            yield Config(1, block, warps)
            continue
        for stages, per_sm in itertools.product((1, 2, 3), (1, 2, 4, 8)):
            yield Config(1, block, warps, stages, per_sm)


def calls(form: str, rows: int, classes: int, dtype: torch.dtype) -> Callable[[], object]:
    """``row_fused`` with the least of a form."""
    logits = torch.randn(rows, classes, dtype=dtype, device="cuda")
    index = torch.randint(classes, (rows, 1), device="cuda")
    spec = Spec(mix_a=0.9, mix_b=0.1 / classes) if form == configs.UNIFORM else Spec()
    target = KernelTarget(index)
    if form == configs.DENSE:
        target = KernelTarget(dense=torch.randn(rows, classes, dtype=dtype, device="cuda").softmax(1))
    if form == configs.HEAVY:
        spec = spec._replace(softcap=30.0)
    extras = form == configs.EXTRAS

    def call() -> Tensor:
        loss, _, _ = backend.row_fused(logits, *target, None, -100, list(spec), True, extras)
        return loss

    return call


def tune(quick: bool = False) -> list[dict[str, Any]]:
    """For each form, type and number of classes the fastest configurations, beside what the table says."""
    from tqdm import tqdm

    from .gpu_measure import Timer

    timer = Timer()
    found = []
    cases = list(itertools.product(configs.FORMS, (torch.bfloat16, torch.float32), CLASSES[:2] if quick else CLASSES))
    for form, dtype, classes in tqdm(cases, desc="configurations"):
        rows = max(132, (ELEMENTS >> (6 if quick else 0)) // classes)
        call = calls(form, rows, classes, dtype)
        now = configs.choose(form, classes, 0, 1, False)
        times: dict[Config, float] = {}
        for config in dict.fromkeys((now, *candidates(classes))):
            with configs.forced(config):
                try:
                    call()
                    torch.cuda.synchronize()
                    times[config] = statistics.median(timer(call) for _ in range(ROUNDS))
                except Exception:  # out of shared memory or registers: not a candidate
                    continue
        best = sorted(times, key=lambda config: times[config])[:3]
        found.append({
            "form": form, "dtype": str(dtype).removeprefix("torch."), "classes": classes, "rows": rows,
            "table": {"config": now._asdict(), "ms": times.get(now)},
            "best": [{"config": config._asdict(), "ms": times[config]} for config in best],
        })  # fmt: skip
    return found
