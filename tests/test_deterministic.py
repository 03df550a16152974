# SPDX-License-Identifier: BSD-3-Clause
"""Bit-identical results: from run to run, whatever the number of threads, and wherever a tensor lies in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, cases
from checks import same, threads
from torch import Tensor

import softce

OPTIONS = softce.Options(backend="cpu")

# Enough work that it is spread over threads, by rows, by few long rows, by planes and by few classes.
LARGE = [
    Case(shape, target, options, weight=options == "smoothed")
    for shape in ((3001, 97), (20000, 10), (3, 50021), (1, 200003), (4, 19, 61, 31), (2, 3, 40000))
    for target in ("ignored", "probs", "mixup")
    for options in ("smoothed", "none")
]


@pytest.fixture(autouse=True)
def _kernels(cpu_kernels: None) -> None:
    pass


def everything(call: tuple[Tensor, Any, dict[str, Any]], stats: bool = True) -> list[Tensor]:
    """Loss, gradient and statistics of a call. Its inputs are made once: torch's own softmax depends on the threads."""
    input, target, kwargs = call
    x = input.detach().requires_grad_()
    out = softce.cross_entropy(x, target, return_stats=stats, options=OPTIONS, **kwargs)
    loss, facts = (out[0], list(out[1])) if stats else (out, [])
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return [loss.detach(), grad, *(fact.detach() for fact in facts if fact.is_floating_point())]


def assert_same(got: list[Tensor], want: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert same(a, b), f"{what}: result {i} differs by {(a.double() - b.double()).abs().max()}"


TABLE = [
    pytest.param(case, dtype, i % 4 == 0, id=f"{case.name}-{str(dtype)[6:]}{'-stats' if i % 4 == 0 else ''}")
    for i, case in enumerate(cases())
    for dtype in ((torch.float32, torch.bfloat16) if i % 2 else (torch.float32,))
]


@pytest.mark.parametrize(("case", "dtype", "stats"), TABLE)
def test_one_thread_two_threads_and_again(case: Case, dtype: torch.dtype, stats: bool) -> None:
    call = case.make("cpu", dtype)
    with threads(1):
        want = everything(call, stats)
        assert_same(everything(call, stats), want, "run to run")
    for count in (2, 3):
        with threads(count):
            assert_same(everything(call, stats), want, f"{count} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
def test_large_cases_on_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    call = case.make("cpu", dtype)
    with threads(1):
        want = everything(call, stats=False)
    for count in (2, 3, 5):
        with threads(count):
            assert_same(everything(call, stats=False), want, f"{count} threads")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 100, 257, 4099, 50021])
def test_memory_alignment_does_not_matter(classes: int, dtype: torch.dtype) -> None:
    """The same rows at other offsets give the same bits: peeling up to an aligned address must not change sums."""
    x = torch.randn(3, classes).to(dtype)
    y = torch.tensor([0, classes // 2, classes - 1])

    def at(offset: int) -> list[Tensor]:
        wide = torch.empty(3 * classes + offset, dtype=dtype)[offset:].view(3, classes)
        wide.copy_(x)
        wide.requires_grad_()
        loss = softce.cross_entropy(wide, y, label_smoothing=0.1, options=OPTIONS)
        return [loss.detach(), *torch.autograd.grad(loss, wide)]

    want = at(0)
    for offset in (1, 2, 3, 5, 8, 13, 17):
        assert_same(at(offset), want, f"offset {offset}")


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Rows of the same logits and target have the same loss and gradient, in any batch and place."""
    for classes in (3, 10, 100, 300, 5000):
        row = torch.randn(classes)
        for batch in (1, 2, 7, 33):
            x = torch.randn(batch, classes)
            for place in {0, batch // 2, batch - 1}:
                x[place] = row
            y = torch.full((batch,), 1)
            leaf = x.clone().requires_grad_()
            loss = softce.cross_entropy(leaf, y, reduction="none", options=OPTIONS)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            results = [(loss[p].detach(), grad[p]) for p in {0, batch // 2, batch - 1}]
            if batch == 1:
                want = results[0]
            for got in results:
                assert same(got[0], want[0]) and same(got[1], want[1]), (classes, batch)


SCRIPT = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from cases import Case
import softce
digest = hashlib.sha256()
cases = Case((300, 1000), "ignored", "smoothed"), Case((2, 21, 40, 40), "unnormalised", "smoothed"), Case((1, 50021))
calls = [case.make() for case in cases]
torch.set_num_threads(int(sys.argv[2]))
for x, t, kwargs in calls:
    x.requires_grad_()
    loss = softce.cross_entropy(x, t, **kwargs)
    loss.backward()
    digest.update(loss.detach().numpy().tobytes() + x.grad.numpy().tobytes())
print(digest.hexdigest())
"""


def test_other_processes_agree() -> None:
    """Different processes, with different address layouts and thread counts."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(Path(softce.__file__).parent.parent)}
    digests: set[Any] = set()
    for count in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT, str(here), count]
        digests.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert len(digests) == 1
