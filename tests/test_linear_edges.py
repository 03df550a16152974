# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear losses on inputs of any rank, shifted, strided, empty or ignored, and as torch's own function."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checks import same
from linear_cases import D, H, N, V, chunked, leaves
from torch import Tensor

import softce
from softce import Options

# ---- ranks, shift, and what torch's function takes ----


def forms(rows: tuple[int, ...]) -> list[Any]:
    """One target of each form for rows of this shape."""
    index = torch.randint(V, rows)
    index.view(-1)[1] = -100
    prob = torch.rand(*rows, V, dtype=D).softmax(-1)
    top = prob.topk(4)
    return [
        index,
        prob,
        softce.TopK(top.indices, top.values, "uniform"),
        softce.Mixup(index, index.flip(0), torch.rand(rows)),
        softce.Teacher(prob.log() * 2, 2.0, divergence=True),
        softce.LinearTeacher(torch.randn(*rows, 3, dtype=D), torch.randn(V, 3, dtype=D)),
    ]


def flat(target: Any, rows: tuple[int, ...], skip_first: bool) -> Any:
    """The same target for flattened rows, without the first step of each sequence if asked."""

    def change(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape[: len(rows)] != rows:
            return x
        x = x.narrow(len(rows) - 1, 1, rows[-1] - 1) if skip_first else x
        return x.reshape(-1, *x.shape[len(rows) :])

    if isinstance(target, Tensor):
        return change(target)
    fields = {f.name: change(getattr(target, f.name)) for f in dataclasses.fields(target)}
    return type(target)(**fields)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("rows", [(6,), (1, 6), (3, 5), (2, 2, 4)], ids=str)
@pytest.mark.parametrize("chunk", [None, (4, V), (4, 16)], ids=["chosen", "rows", "tiles"])
def test_any_rank_and_shift(
    chunk: tuple[int, int] | None, rows: tuple[int, ...], shift: bool, cpu_kernels: None
) -> None:
    x = torch.randn(*rows, H, dtype=D, requires_grad=True)
    w = torch.randn(V, H, dtype=D, requires_grad=True)
    row_weight = torch.rand(rows, dtype=D)
    kept = x[..., :-1, :] if shift else x
    flat_weight = flat(row_weight, rows, shift)
    for target in forms(rows):
        for reduction in ("mean", "none"):
            with chunked(chunk):
                arguments = {"shift": shift, "reduction": reduction, "row_weight": row_weight}
                got = softce.linear_cross_entropy(x, w, target, options=Options(backend="cpu"), **arguments)
                assert reduction == "mean" or got.shape == kept.shape[:-1]
                found = torch.autograd.grad(got.sum(), (x, w))
            logits = F.linear(kept.reshape(-1, H), w)
            plain = flat(target, rows, shift)
            if isinstance(plain, softce.LinearTeacher):
                plain = softce.Teacher(F.linear(plain.hidden, plain.linear_weight))
            want = softce.cross_entropy(
                logits, plain, reduction=reduction, row_weight=flat_weight, options=Options(backend="reference")
            )
            torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-11, atol=1e-12)
            for a, c in zip(found, torch.autograd.grad(want.sum(), (x, w)), strict=True):
                torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)
    if shift:
        short = softce.linear_cross_entropy(x, w, target, shift=True, row_weight=row_weight[..., 1:].contiguous())
        torch.testing.assert_close(short, softce.linear_cross_entropy(x, w, target, shift=True, row_weight=row_weight))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason=f"torch {torch.__version__} has no such function")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(), (3,), (2, 3)], ids=str)
def test_torch_function(outputs: tuple[int, ...], bias: bool, reduction: str) -> None:
    w = torch.randn(V, *outputs, H, dtype=D)
    b = torch.randn(V, *outputs, dtype=D) if bias else None
    weight = torch.rand(V, dtype=D)
    for rows in ((N,), ()) if not outputs else ((N,),):
        x = torch.randn(*rows, H, dtype=D)
        index = torch.randint(V, (*rows, *outputs))
        prob = torch.rand(*rows, V, *outputs, dtype=D)
        for target, more in ((index, {"ignore_index": 3}), (index, {"ignore_index": None}), (prob, {})):
            arguments = {"linear_bias": b, "weight": weight, "reduction": reduction, "label_smoothing": 0.1, **more}
            got = softce.linear_cross_entropy(x, w, target, **arguments)
            torch.testing.assert_close(got, F.linear_cross_entropy(x, w, target, **arguments))


def test_several_dimensions_say_so() -> None:
    x, w, target = torch.randn(4, H), torch.randn(V, 2, H), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.warns(UserWarning, match="as a whole"):
        softce.linear_cross_entropy(x, w, target, options=Options(explain=True))


# ---- edges ----


def test_no_rows() -> None:
    x, w = torch.randn(0, H), torch.randn(V, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    assert softce.linear_cross_entropy(x, w, none).isnan()
    assert softce.linear_cross_entropy(x, w, none, empty="zero") == 0
    assert softce.linear_cross_entropy(x, w, none, reduction="sum") == 0
    assert softce.linear_cross_entropy(x, w, none, reduction="none").shape == (0,)
    assert softce.linear_cross_entropy(x, w, torch.rand(0, V)).isnan()
    softce.linear_cross_entropy(x, w, none, reduction="sum").backward()
    assert w.grad is not None and not w.grad.any()
    one_step = torch.randn(2, 1, H), w, torch.zeros(2, 1, dtype=torch.int64)
    assert softce.linear_cross_entropy(*one_step, shift=True).isnan()


@pytest.mark.parametrize("chunk", [None, (4, 16)], ids=["chosen", "tiles"])
def test_all_rows_ignored(chunk: tuple[int, int] | None, cpu_kernels: None) -> None:
    for kwargs, want in (({}, torch.nan), ({"empty": "zero"}, 0.0), ({"reduction": "sum"}, 0.0)):
        x, w, b = leaves(torch.float32)
        assert b is not None
        with chunked(chunk):
            loss = softce.linear_cross_entropy(x, w, torch.full((N,), -100), linear_bias=b, **kwargs)
            loss.backward()
        torch.testing.assert_close(loss.detach(), torch.tensor(want), equal_nan=True)
        for leaf in (x, w, b):
            assert leaf.grad is not None and not leaf.grad.any()


def test_ignored_rows_are_not_read(options: Options) -> None:
    """What they hold, nan and inf included, reaches neither the loss nor any gradient."""
    x, w, _ = leaves(D)
    target = torch.arange(N)
    target[::3] = -100
    with torch.no_grad():
        x[::3] = torch.nan
        x[3] = torch.inf
    loss = softce.linear_cross_entropy(x, w, target, options=options)
    loss.backward()
    want = F.cross_entropy(F.linear(x.detach(), w.detach())[target >= 0], target[target >= 0])
    torch.testing.assert_close(loss.detach(), want)
    assert x.grad is not None and w.grad is not None and w.grad.isfinite().all()
    assert not x.grad[::3].any() and x.grad[1].any()


def test_ignored_rows_are_dropped_before_the_products(cpu_kernels: None) -> None:
    x, w = torch.randn(64, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    target = torch.full((64,), -100)
    target[5] = target[40] = 1
    seen = []
    original = torch.mm

    def mm(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(a.shape))
        return original(a, b, *args, **kwargs)

    with mock.patch("torch.mm", mm):
        softce.linear_cross_entropy(x, w, target).backward()
    assert seen and all(min(a, b) <= 2 for a, b in seen), seen


def test_strided_and_expanded_arguments(cpu_kernels: None) -> None:
    x = torch.randn(5, H, dtype=D).expand(3, 5, H)
    w = torch.randn(H, 2 * V, dtype=D)[:, ::2].t()
    target = torch.randint(V, (5, 6))[:, ::2].t()
    got = softce.linear_cross_entropy(x, w, target)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, w).reshape(-1, V), target.reshape(-1)))
    prob = torch.rand(1, V, dtype=D).expand(15, V)
    got = softce.linear_cross_entropy(x.reshape(15, H), w, prob)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, w).reshape(-1, V), prob))


def test_same_bits_from_run_to_run(cpu_kernels: None) -> None:
    x, w = torch.randn(300, 32, requires_grad=True), torch.randn(1000, 32, requires_grad=True)
    target = torch.randint(1000, (300,))
    found = []
    for _ in range(2):
        loss = softce.linear_cross_entropy(x, w, target, label_smoothing=0.1)
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
    assert all(same(a, c) for a, c in zip(*found, strict=True))
