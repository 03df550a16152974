# SPDX-License-Identifier: BSD-3-Clause
"""Triton's interpreter: it has to be chosen before kernels are imported, so what is interpreted runs in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A loop from and to an integer, and one from a tensor: not every Triton's interpreter goes with every NumPy.
PROBE = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(x, n):
    total = tl.zeros([4], tl.float32)
    for i in range(n):
        total += tl.load(x + tl.arange(0, 4))
    for i in tl.range(tl.program_id(0), n):
        total += 1.0
    tl.store(x + tl.arange(0, 4), total)
x = torch.ones(4)
kernel[(1,)](x, 3)
assert x.tolist() == [6.0] * 4
"""


def environment() -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}


def skip_where_broken(folder: Path) -> None:
    """Skips the test where this Triton's interpreter does not work; folder is for a scratch file."""
    probe = folder / "probe.py"
    probe.write_text(PROBE)
    broken = subprocess.run([sys.executable, probe], env=environment(), capture_output=True, text=True)
    if broken.returncode:
        last = (broken.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"this Triton's interpreter does not work here: {last}")
