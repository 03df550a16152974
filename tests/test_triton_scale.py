# SPDX-License-Identifier: BSD-3-Clause
"""The kernel that applies the upstream gradient: in the interpreter, and compiled ahead of time."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from interpreter import environment, skip_where_broken

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = textwrap.dedent(
    """
    import torch
    from softce.backends import triton_scale as s

    for dtype, factor_dtype in ((torch.float32, torch.float32), (torch.float16, torch.float32),
                                (torch.float64, torch.float64)):
        for count in (0, 1, s.BLOCK - 1, s.BLOCK, 3 * s.BLOCK + 5):
            x = torch.randn(count).to(dtype)
            for factor in (1.0, -0.3, float("nan")):
                f = torch.tensor(factor, dtype=factor_dtype)
                got = s.scale_(x.clone(), f)
                want = (x.to(factor_dtype) * f).to(dtype)
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    print("scaled")
    """
)


def test_interpreted(tmp_path: Path) -> None:
    skip_where_broken(tmp_path)
    chosen = {**environment(), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=chosen, capture_output=True, text=True)
    assert done.returncode == 0 and "scaled" in done.stdout, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_with_wide_accesses(capability, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from softce.backends.triton_scale import BLOCK, scale_kernel

    signature = {"x": "*bf16", "factor": "*fp32", "count": "i64", "BLOCK": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    source = ASTSource(scale_kernel, signature, constexprs={(3,): BLOCK}, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = compiled.asm["ptx"]
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
