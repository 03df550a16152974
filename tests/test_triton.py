# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels in Triton's interpreter, on CPU tensors: no GPU needed, every operator, option and layout.

The interpreter has to be chosen before the kernels are imported, so the tests of this file run in a process of their
own, with ``TRITON_INTERPRET=1`` and without the C++ kernels, in whose place the Triton implementations are registered:
``softce.cross_entropy`` then runs on them as it would on a GPU. Loss and gradient are held against the float64 oracle
(tests/oracle.py) over the shared table of cases, single operators against the reference formula in float64.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WITHOUT = next((name for name in ("triton", "numpy") if importlib.util.find_spec(name) is None), None)

if WITHOUT:
    pytest.skip(f"{WITHOUT} is not installed", allow_module_level=True)

PROBE = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(x, n):
    total = tl.zeros([4], tl.float32)
    for i in range(n):
        total += tl.load(x + tl.arange(0, 4))
    tl.store(x + tl.arange(0, 4), total)
x = torch.ones(4)
kernel[(1,)](x, 3)
assert x.tolist() == [3.0] * 4
"""


def _interpreter_environment() -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "1", "SOFTCE_LIBRARY": os.devnull + "/none", "PYTHONWARNINGS": "ignore"}


if not INTERPRETED:

    def test_in_the_interpreter(request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """Runs this file again, interpreted."""
        probe = tmp_path / "probe.py"
        probe.write_text(PROBE)
        environment = _interpreter_environment()
        broken = subprocess.run([sys.executable, probe], env=environment, capture_output=True, text=True)
        if broken.returncode:
            pytest.skip(f"this Triton's interpreter does not work here: {broken.stderr.strip().splitlines()[-1]}")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE)]
        expression = request.config.getoption("markexpr")
        if expression:
            command += ["-m", expression]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        passed = re.search(r"(\d+) passed", result.stdout)
        assert passed and int(passed[1]) > 100, result.stdout[-500:]

else:
    import torch
    from torch import Tensor

    import softce
    from softce import backends, ops, reference
    from softce.backends import gpu, triton_configs
    from softce.backends import triton as backend
    from softce.backends.triton_configs import Config
    from softce.ops import KernelTarget, Spec

    import oracle
    from cases import Case, cases
    from checks import EPS, assert_rounded_once, run, same

    gpu.register("CPU")
    backends._reasons["cpu"] = []  # the operators for CPU tensors are there: the Triton ones
    backends._reasons["cuda"] = ["not in the interpreter"]

    ALL = list(cases())

    @pytest.fixture(autouse=True)
    def _one_thread() -> Iterator[None]:
        torch.set_num_threads(1)
        yield

    def check_case(case: Case, dtype: torch.dtype) -> None:
        input, target, kwargs = case.make("cpu", dtype)
        before = backend.LAUNCHES["row_kernel"]
        loss, grad = run(softce.cross_entropy, input, target, **kwargs)
        launches = backend.LAUNCHES["row_kernel"] - before
        assert launches, "no kernel ran"
        want = oracle.evaluate(input, target, **kwargs)
        what = f"{case.name} {dtype}"
        if dtype == torch.bfloat16:
            # The interpreter cuts float32 to bfloat16 where a GPU rounds: a whole unit in the last place.
            for got, exact in ((loss, want.loss), (grad, want.grad)):
                floor = 1e-6 * float(exact.abs().nan_to_num().max()) if exact.numel() else 0.0
                torch.testing.assert_close(
                    got.double(), exact, rtol=1.01 * EPS[dtype], atol=floor, equal_nan=True, msg=lambda m: f"{what}: {m}"
                )
            return
        assert_rounded_once(loss, want.loss, what=f"{what} loss")
        assert_rounded_once(grad, want.grad, what=f"{what} gradient", scale=want.grad_scale)

    @pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
    def test_case(case: Case) -> None:
        check_case(case, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", ALL[::9], ids=lambda case: case.name)
    def test_case_of_other_dtypes(case: Case, dtype: torch.dtype) -> None:
        check_case(case, dtype)
