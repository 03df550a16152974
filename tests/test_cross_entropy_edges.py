# SPDX-License-Identifier: BSD-3-Clause
"""``softce.cross_entropy`` where there is nothing to sum, at infinite, huge and nan logits, in half precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from checks import EPS, assert_rounded_once, assert_same_as_torch, run
from oracle import evaluate

import softce

INF, NAN = math.inf, math.nan
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


# ---- empty and degenerate ----


def test_no_rows_in_any_layout(options: softce.Options) -> None:
    """No row has any stride; nothing may divide by the number of rows."""
    for size, stride in (
        ((0, 64), (1, 0)),
        ((0, 64), (0, 0)),
        ((0, 64), (1, 7)),
        ((1, 64, 0), (0, 3, 1)),
        ((0, 64, 3), (1, 1, 1)),
        ((0, 0), (1, 0)),
        ((2, 0, 3), (0, 0, 1)),
        ((2, 5, 0, 3), (1, 1, 1, 1)),
    ):
        x = torch.empty_strided(size, stride, requires_grad=True)
        for t in (torch.full((size[0], *size[2:]), -100), torch.rand(size), torch.empty_strided(size, stride)):
            for reduction in ("mean", "sum", "none"):
                loss = softce.cross_entropy(x, t, reduction=reduction, label_smoothing=0.1, options=options)
                (grad,) = torch.autograd.grad(loss.sum(), x)
                assert grad.shape == size
                assert (
                    loss.shape == (t.shape[:1] + t.shape[2:] if t.shape == x.shape else t.shape) or reduction != "none"
                )


@by_reduction
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (2, 4, 0, 3), (0, 4, 0)], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_no_rows(shape: Any, dense: bool, reduction: str, backend: str) -> None:
    x = torch.randn(shape)
    t = torch.rand(shape) if dense else torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        assert_same_as_torch(x, t, backend, reduction=reduction, label_smoothing=smoothing)
        assert_same_as_torch(x, t, backend, reduction=reduction, label_smoothing=smoothing, weight=torch.rand(4))


@by_reduction
@pytest.mark.parametrize("shape", [(3, 0), (0,), (0, 0), (2, 0, 3)], ids=str)
def test_no_classes_with_probabilities(shape: Any, reduction: str, backend: str) -> None:
    for dtype in (torch.float32, torch.float16):
        assert_same_as_torch(torch.randn(shape).to(dtype), torch.rand(shape).to(dtype), backend, reduction=reduction)


@by_reduction
def test_no_classes_with_indices(reduction: str, options: softce.Options) -> None:
    """Only ignored rows can be there; anything else is out of range."""
    x = torch.randn(2, 0)
    loss, grad = run(softce.cross_entropy, x, torch.tensor([-100, -100]), reduction=reduction, options=options)
    want = {"mean": torch.tensor(NAN), "sum": torch.tensor(0.0), "none": torch.zeros(2)}[reduction]
    torch.testing.assert_close(loss, want, equal_nan=True)
    assert grad.shape == (2, 0)
    with pytest.raises(IndexError):
        softce.cross_entropy(x, torch.tensor([0, -100]), reduction=reduction, options=options)


@by_reduction
@pytest.mark.parametrize("smoothing", [0.1, 1.0, NAN])
@pytest.mark.parametrize("shape", [(3, 0), (0,), (0, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:label_smoothing")
def test_no_classes_with_smoothing(shape: Any, smoothing: float, reduction: str, backend: str) -> None:
    """Torch divides by the number of classes: nan even where every row is ignored."""
    x = torch.randn(shape)
    for target in (torch.full(shape[:-1], -100), torch.rand(shape)):
        for weight in (None, torch.ones(0)):
            more = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
            assert_same_as_torch(x, target, backend, **more)


@by_reduction
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_class(dense: bool, smoothing: float, reduction: str, backend: str) -> None:
    t = torch.rand(4, 1) if dense else torch.tensor([0, -100, 0, 0])
    assert_same_as_torch(torch.randn(4, 1), t, backend, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(weighted: bool, smoothing: float, options: softce.Options) -> None:
    """mean: nan with a gradient of 0; sum and none: 0."""
    x, y = torch.randn(3, 4), torch.full((3,), -100)
    w = torch.rand(4) if weighted else None
    for reduction, want in (("mean", torch.tensor(NAN)), ("sum", torch.tensor(0.0)), ("none", torch.zeros(3))):
        kwargs = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
        loss, grad = run(softce.cross_entropy, x, y, options=options, **kwargs)
        torch.testing.assert_close(loss, want, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(F.cross_entropy(x, y, **kwargs), want, equal_nan=True, rtol=0, atol=0)
        assert torch.equal(grad, torch.zeros_like(x))


def test_all_target_weights_zero(backend: str) -> None:
    """mean divides 0 by 0: nan, and a gradient of nan."""
    x, y, w = torch.randn(3, 4), torch.tensor([1, 1, -100]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    options = softce.Options(backend=backend)
    loss, grad = run(softce.cross_entropy, x, y, weight=w, options=options)
    theirs, their_grad = run(F.cross_entropy, x, y, weight=w)
    assert loss.isnan() and theirs.isnan()
    assert torch.equal(grad.isnan(), their_grad.isnan()), (grad, their_grad)
    for reduction in ("sum", "none"):
        assert_same_as_torch(x, y, backend, weight=w, reduction=reduction)


def test_zero_weights_and_zero_targets(backend: str) -> None:
    x = torch.randn(3, 4)
    assert_same_as_torch(x, torch.zeros(3, 4), backend, reduction="sum")
    assert_same_as_torch(x, torch.rand(3, 4), backend, weight=torch.zeros(4))
    assert_same_as_torch(x, torch.rand(3, 4), backend, weight=torch.tensor([0.0, 1.0, 0.0, 2.0]), label_smoothing=0.1)


# ---- values out of the ordinary ----


@by_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wide", [0, 300], ids=["few classes", "many classes"])
def test_minus_infinity_beside_the_target(reduction: str, smoothing: float, wide: int, backend: str) -> None:
    """A masked class: finite loss; with smoothing an infinite loss; a finite gradient either way."""
    x = torch.randn(3, 4 + wide)
    x[0, 1] = x[2, 0] = x[2, 3] = -INF
    x[2, 4:] = -INF
    y = torch.tensor([0, 3, 2])
    assert_same_as_torch(x, y, backend, reduction=reduction, label_smoothing=smoothing)
    _, grad = run(
        softce.cross_entropy, x, y, label_smoothing=smoothing, reduction="sum", options=softce.Options(backend=backend)
    )
    assert grad.isfinite().all()


@by_reduction
def test_minus_infinity_at_the_target(reduction: str, backend: str) -> None:
    """Infinite loss, finite gradient."""
    x = torch.randn(3, 4)
    x[1, 2] = -INF
    y = torch.tensor([0, 2, 1])
    assert_same_as_torch(x, y, backend, reduction=reduction)
    loss, grad = run(softce.cross_entropy, x, y, options=softce.Options(backend=backend))
    assert loss == INF and grad.isfinite().all()


def test_minus_infinity_with_smoothing_and_a_zero_weight(backend: str) -> None:
    """Torch: nan where the masked class weighs nothing, 0 * inf. Here 0 * (-inf) is 0, as for probabilities."""
    x, w = torch.randn(2, 4), torch.tensor([1.0, 0.0, 2.0, 1.0])
    x[0, 1] = -INF
    y = torch.tensor([0, 3])
    want = evaluate(x, y, weight=w, label_smoothing=0.1)
    loss, grad = run(softce.cross_entropy, x, y, weight=w, label_smoothing=0.1, options=softce.Options(backend=backend))
    assert_rounded_once(grad, want.grad)
    assert_rounded_once(loss, want.loss)


@by_dtype
@by_reduction
def test_probability_zero_on_minus_infinity(dtype: torch.dtype, reduction: str, backend: str) -> None:
    """Counts as 0, on purpose (torch: nan loss with this same gradient): what masked vocabularies need."""
    x, t = torch.randn(3, 5).to(dtype), torch.rand(3, 5).to(dtype)
    x[:, 1:3] = -INF
    t[:, 1:3] = 0
    want = evaluate(x, t, reduction=reduction)
    loss, grad = run(softce.cross_entropy, x, t, reduction=reduction, options=softce.Options(backend=backend))
    assert loss.isfinite().all()
    assert_rounded_once(loss, want.loss)
    assert_rounded_once(grad, want.grad)
    if dtype == torch.float32:
        _, theirs = run(F.cross_entropy, x, t, reduction=reduction)
        torch.testing.assert_close(grad, theirs)


def opposed(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A target whose weight in class 3 is the sum of parts of different signs, and the options that make it so."""
    rows = (shape[0], *shape[2:])
    if kind == "negative probability":
        t = torch.rand(shape)
        t[:, 3] = -2.0
        return t.to(dtype), {"label_smoothing": 0.25}
    if kind == "others":
        return torch.full(rows, 3), {"smoothing": "others", "label_smoothing": 1.0}
    prob = torch.tensor([0.25, 0.0 if kind == "listed with nothing" else 2.0**-14])
    return softce.TopK(torch.tensor([0, 3]).expand(*rows, 2), prob.to(dtype).expand(*rows, 2), "uniform"), {}


@by_dtype
@by_reduction
@pytest.mark.parametrize("shape", [(3, 9), (3, 2500), (2, 9, 3)], ids=["short rows", "rows", "planes"])
@pytest.mark.parametrize("kind", ["negative probability", "others", "listed with nothing", "listed with little"])
@pytest.mark.filterwarnings("ignore:.*negative")
def test_minus_infinity_where_parts_of_the_target_have_both_signs(
    kind: str, shape: tuple[int, ...], reduction: str, dtype: torch.dtype, backend: str
) -> None:
    """The class's weight is put together first; only then is it multiplied with the logit."""
    x = torch.randn(shape).to(dtype)
    x[0, 3] = -INF
    target, more = opposed(kind, shape, dtype)
    more["reduction"] = reduction
    want = evaluate(x, target, **more)
    loss, grad = run(softce.cross_entropy, x, target, options=softce.Options(backend=backend), **more)
    infinite = {"negative probability": -INF, "listed with little": INF}.get(kind)
    assert bool((loss.flatten()[0] == infinite) if infinite else loss.isfinite().all())
    tolerance = 64 * EPS[dtype]
    torch.testing.assert_close(loss.double(), want.loss, rtol=tolerance, atol=tolerance)
    assert_rounded_once(grad, want.grad, scale=want.grad_scale * max(1.0, float(want.lse.abs().max())))
    if kind == "negative probability":
        assert_same_as_torch(x, target, backend, **more)
    x.requires_grad_()
    again = softce.cross_entropy(x, target, options=softce.Options(backend=backend), **more)
    (grad,) = torch.autograd.grad(again.sum(), x, create_graph=True)
    assert_rounded_once(grad, evaluate(x, target, **more).grad, scale=want.grad_scale * 8)


@by_reduction
@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("classes", [4, 40, 3000])
def test_infinity_and_nan_make_their_row_nan(value: float, classes: int, reduction: str, backend: str) -> None:
    x = torch.randn(3, classes)
    x[1, classes // 2] = value
    for y in (torch.tensor([0, 1, 3]), torch.tensor([0, classes // 2, 3])):
        assert_same_as_torch(x, y, backend, reduction=reduction)
        assert_same_as_torch(x, y, backend, reduction=reduction, label_smoothing=0.1)
    t = torch.rand(3, classes)
    assert_same_as_torch(x, t, backend, reduction=reduction)


@by_reduction
@pytest.mark.parametrize("classes", [1, 4, 300])
def test_a_row_of_minus_infinity_is_nan(classes: int, reduction: str, backend: str) -> None:
    x = torch.randn(3, classes)
    x[1] = -INF
    assert_same_as_torch(x, torch.zeros(3, dtype=torch.int64), backend, reduction=reduction)
    loss, _ = run(
        softce.cross_entropy,
        x,
        torch.rand(3, classes) + 0.1,
        reduction=reduction,
        options=softce.Options(backend=backend),
    )
    assert loss.isnan().sum() == 1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("planes", [False, True])
def test_an_ignored_row_may_hold_anything(value: float, reduction: str, planes: bool, options: softce.Options) -> None:
    """Its gradient is 0, on purpose (torch: nan)."""
    x = torch.randn(3, 4, 2) if planes else torch.randn(6, 4)
    y = torch.randint(4, (3, 2) if planes else (6,))
    clean = run(softce.cross_entropy, x, y.masked_fill(y == 2, -100), reduction=reduction, options=options)
    y = y.clone()
    row = (slice(1, 2), slice(None), 0) if planes else (slice(1, 2),)
    index = (1, 0) if planes else (1,)
    x[row] = 0.5
    y[index] = -100
    clean = run(softce.cross_entropy, x, y, reduction=reduction, options=options)
    x[row] = value
    spoiled = run(softce.cross_entropy, x, y, reduction=reduction, options=options)
    torch.testing.assert_close(spoiled[0], F.cross_entropy(x, y, reduction=reduction))
    torch.testing.assert_close(spoiled, clean, rtol=1e-6, atol=1e-7)
    assert torch.equal(spoiled[1][row], torch.zeros_like(x[row]))


@by_reduction
@pytest.mark.parametrize(("size", "smoothing"), [(1e4, 0.0), (1e4, 0.1), (1e30, 0.0), (1e30, 0.1), (3e38, 0.0)])
def test_huge_logits(size: float, reduction: str, smoothing: float, backend: str) -> None:
    """No overflow where the loss itself fits; compared with the oracle: torch rounds differently there."""
    x = torch.randn(4, 6)
    x[0, 1], x[1, 5], x[2, :] = size, -size, -size
    y = torch.tensor([1, 0, 3, 2])
    want = evaluate(x, y, reduction=reduction, label_smoothing=smoothing)
    loss, grad = run(
        softce.cross_entropy,
        x,
        y,
        reduction=reduction,
        label_smoothing=smoothing,
        options=softce.Options(backend=backend),
    )
    assert_rounded_once(loss, want.loss, what="loss")
    assert_rounded_once(grad, want.grad, what="gradient")


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e3, 1e5])
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_a_common_shift_changes_nothing(shift: float, dense: bool, options: softce.Options) -> None:
    """Logits on a grid that float32 holds exactly after the shift, so the loss must not move."""
    x = torch.randint(-64, 64, (5, 50)) / 16.0
    t = torch.rand(5, 50).softmax(1) if dense else torch.randint(50, (5,))
    want = run(softce.cross_entropy, x, t, options=options)
    got = run(softce.cross_entropy, x + shift, t, options=options)
    torch.testing.assert_close(got[0], want[0], rtol=4e-6, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=4e-6, atol=1e-9)


def test_an_outlier_anywhere_in_a_long_row(backend: str) -> None:
    """The largest logit at the start, the end and at block borders of rows whose other logits are tiny beside it."""
    classes = 5003
    for at in (0, 1, 15, 16, 63, 64, 255, 256, 1023, 1024, 2048, 4095, 4096, 5002):
        x = torch.randn(1, classes)
        x[0, at] = 95.0
        for y in (torch.tensor([at]), torch.tensor([(at + 7) % classes])):
            want = evaluate(x, y, label_smoothing=0.1)
            loss, grad = run(softce.cross_entropy, x, y, label_smoothing=0.1, options=softce.Options(backend=backend))
            assert_rounded_once(loss, want.loss, what=f"loss, outlier at {at}")
            assert_rounded_once(grad, want.grad, what=f"gradient, outlier at {at}", scale=want.grad_scale)


@pytest.mark.parametrize("step", [30.0, 60.0, 100.0, -60.0])
def test_a_maximum_that_keeps_rising(step: float, backend: str) -> None:
    """Each block of classes far above the one before it (or below)."""
    x = torch.randn(2, 4096) + step * torch.arange(16).repeat_interleave(256)
    y = torch.tensor([4095, 100])
    want = evaluate(x, y)
    loss, grad = run(softce.cross_entropy, x, y, options=softce.Options(backend=backend))
    assert_rounded_once(loss, want.loss)
    assert_rounded_once(grad, want.grad, scale=want.grad_scale)


# ---- half precision ----


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_with_very_many_classes(half: torch.dtype, backend: str) -> None:
    """Torch's float16 log_softmax overflows to inf from 65,536 classes on."""
    x = torch.randn(2, 70000).to(half)
    y = torch.tensor([3, 69999])
    for kwargs in ({}, {"label_smoothing": 0.1, "reduction": "none"}):
        want = evaluate(x, y, **kwargs)
        loss, grad = run(softce.cross_entropy, x, y, options=softce.Options(backend=backend), **kwargs)
        assert_rounded_once(loss, want.loss, what="loss")
        assert_rounded_once(grad, want.grad, what="gradient", scale=want.grad_scale)


def test_float16_mean_over_thousands_of_rows(backend: str) -> None:
    """Torch's float16 sum overflows there with smoothing."""
    x, y = torch.randn(9000, 20).half() * 5, torch.randint(20, (9000,))
    loss, _ = run(softce.cross_entropy, x, y, label_smoothing=0.1, options=softce.Options(backend=backend))
    want = F.cross_entropy(x.double(), y, label_smoothing=0.1)
    assert_rounded_once(loss, want)


@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_float16_gradients_survive_a_loss_scaler(scale: float, backend: str) -> None:
    """Upstream factors reach the gradient before it is rounded: a mean over many rows would underflow first."""
    rows = 2048
    x = torch.randn(rows, 16).half().requires_grad_()
    y = torch.randint(16, (rows,))
    loss = softce.cross_entropy(x, y, options=softce.Options(backend=backend), loss_dtype=torch.float32)
    (loss * scale).backward()
    want = evaluate(x.detach(), y, upstream=scale)
    assert_rounded_once(x.grad, want.grad, what="gradient", scale=want.grad_scale)
