# SPDX-License-Identifier: BSD-3-Clause
"""Row losses: their formulas to the edges of their range, in every backend, and per-class factors."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softce

ROW_LOSSES: dict[str, Any] = {
    "focal 0": softce.Focal(0.0),
    "focal 0.5": softce.Focal(0.5),
    "focal 2": softce.Focal(2.0, 0.25),
    "focal 5": softce.Focal(5.0),
    "relaxation": softce.LabelRelaxation(0.1),
    "relaxation 0": softce.LabelRelaxation(0.0),
    "relaxation 1e-6": softce.LabelRelaxation(1e-6),
    "gce": softce.GeneralizedCrossEntropy(0.7),
    "gce 1": softce.GeneralizedCrossEntropy(1.0),
    "gce 1e-3": softce.GeneralizedCrossEntropy(1e-3),
    "poly1": softce.Poly1(1.0),
    "poly1 -1": softce.Poly1(-1.0),
}


def _exact(row_loss: Any, l: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:  # noqa: E741 (l as in the formulas)
    """phi and phi' from the definitions, in many digits."""
    p = mpmath.exp(-l)
    if isinstance(row_loss, softce.Focal):
        g, a = mpmath.mpf(row_loss.gamma), mpmath.mpf(row_loss.alpha)
        if l == 0:
            return mpmath.mpf(0), a if g == 0 else mpmath.mpf(0)
        return a * (1 - p) ** g * l, a * (1 - p) ** g + a * g * (1 - p) ** (g - 1) * p * l
    if isinstance(row_loss, softce.LabelRelaxation):
        a = mpmath.mpf(row_loss.alpha)
        if a == 0:
            return l, mpmath.mpf(1)
        if p > 1 - a:
            return mpmath.mpf(0), mpmath.mpf(0)
        value = (1 - a) * mpmath.log((1 - a) / p) + a * mpmath.log(a / (1 - p))
        return value, (1 - a) - a * p / (1 - p)
    if isinstance(row_loss, softce.GeneralizedCrossEntropy):
        q = mpmath.mpf(row_loss.q)
        return (1 - p**q) / q, p**q
    c = mpmath.mpf(row_loss.epsilon)
    return l + c * (1 - p), 1 + c * p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_phi_and_slope_over_the_whole_range(name: str, dtype: torch.dtype) -> None:
    row_loss, eps = ROW_LOSSES[name], torch.finfo(dtype).eps
    # 1 + epsilon e^-l cancels for negative epsilon: it is as accurate as the two terms are.
    scale = 1.0 if isinstance(row_loss, softce.Poly1) else 1e-6
    points = [0.0, 1e-30, 1e-12, 1e-7, 1e-4, 0.09, 0.2, math.log(2), 2.0, 17.0, 88.0, 104.0, 1e3, 1e30]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    value = row_loss(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, allow_unused=True) if slope.requires_grad else (torch.zeros(()),)
    assert bend is None or not bend.isnan().any(), bend
    with mpmath.workdps(60):
        for i, point in enumerate(x.tolist()):
            want = _exact(row_loss, mpmath.mpf(point))
            for got, exact in zip((value[i].item(), slope[i].item()), want, strict=True):
                assert abs(got - float(exact)) <= 40 * eps * max(abs(float(exact)), scale), (point, got, float(exact))


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_infinite_and_slightly_negative_losses(name: str) -> None:
    row_loss = ROW_LOSSES[name]
    x = torch.tensor([math.inf, -1e-8], requires_grad=True)
    value = row_loss(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    bounded = isinstance(row_loss, softce.GeneralizedCrossEntropy)
    assert value[0].item() == (pytest.approx(1 / row_loss.q) if bounded else math.inf)
    assert not slope.isnan().any() and abs(value[1].item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_sure_and_hopeless_rows(name: str, dtype: torch.dtype, options: softce.Options) -> None:
    """p_y -> 1 and p_y -> 0 through the whole call: the formula on log-probabilities, and no nan."""
    gaps = torch.tensor([0.0, 1e-3, 2.0, 9.0, 17.0, 40.0, 95.0, 300.0, 1e4])
    gaps = torch.cat((gaps, -gaps))
    logits = torch.stack((gaps, torch.zeros_like(gaps), torch.full_like(gaps, -3.0)), 1).to(dtype)
    target = torch.zeros(len(gaps), dtype=torch.int64)
    row_loss = ROW_LOSSES[name]
    x = logits.clone().requires_grad_()
    loss = softce.cross_entropy(x, target, row_loss=row_loss, reduction="none", options=options)
    fused = softce.cross_entropy(x, target, row_loss=row_loss, reduction="sum", options=options)
    assert isinstance(loss, Tensor) and isinstance(fused, Tensor)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    (fused_grad,) = torch.autograd.grad(fused, x)
    assert torch.isfinite(loss).all() and torch.isfinite(grad).all() and torch.isfinite(fused_grad).all()

    wide = logits.double().requires_grad_()
    want = row_loss(F.cross_entropy(wide, target, reduction="none"))
    (want_grad,) = torch.autograd.grad(want.sum(), wide)
    # Near p = 1 the loss itself carries a rounding error of the accumulation dtype, which phi passes on.
    acc = 1e-12 if dtype == torch.float64 else 2e-6
    tolerance = {"rtol": 5e-3 if dtype == torch.bfloat16 else 10 * acc, "atol": 10 * acc}
    if name == "focal 0.5":  # an infinite curvature at p = 1: an error e in l is one of sqrt(e) in phi'
        tolerance["atol"] = acc**0.5
    torch.testing.assert_close(loss.double(), want.detach(), **tolerance)
    for found in (grad, fused_grad):
        torch.testing.assert_close(found.double(), want_grad, **tolerance)


def test_textbook_formulas(options: softce.Options) -> None:
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(6, (8,))
    p = F.softmax(x, 1)[torch.arange(8), y]
    want = {
        softce.Focal(2.0, 0.25): -0.25 * (1 - p) ** 2 * p.log(),
        softce.GeneralizedCrossEntropy(0.7): (1 - p**0.7) / 0.7,
        softce.Poly1(2.0): -p.log() + 2 * (1 - p),
        softce.LabelRelaxation(0.2): torch.where(p > 0.8, 0.0, 0.8 * (0.8 / p).log() + 0.2 * (0.2 / (1 - p)).log()),
    }
    for row_loss, each in want.items():
        for reduction, value in (("none", each), ("sum", each.sum()), ("mean", each.mean())):
            loss = softce.cross_entropy(x, y, row_loss=row_loss, reduction=reduction, options=options)
            torch.testing.assert_close(loss, value)


def test_a_callable_of_ones_own(options: softce.Options) -> None:
    """Any torch function of the (R,) row losses; ignored rows stay at 0 whatever it makes of 0."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, -100, 3, 2])

    def phi(loss: Tensor) -> Tensor:
        return torch.log1p(loss) + 1.0

    loss = softce.cross_entropy(x, y, row_loss=phi, options=options)
    each = F.cross_entropy(x, y, reduction="none")
    want = torch.where(y >= 0, phi(each), 0.0).sum() / 4
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (loss, want)))
    assert torch.autograd.gradcheck(lambda x: softce.cross_entropy(x, y, row_loss=phi, options=options), (x,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_callable_must_return_one_loss_a_row(reduction: str, options: softce.Options) -> None:
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, -100, 3])
    for phi, kind, message in (
        (lambda loss: loss.sum(), ValueError, r"one loss a row, of shape \[4\], got shape \[\]"),
        (lambda loss: loss[:, None], ValueError, r"got shape \[4, 1\]"),
        (lambda loss: None, TypeError, "must return a Tensor, not NoneType"),
        (softce.Focal, TypeError, r"got the class: pass Focal\(..\)"),
    ):
        with pytest.raises(kind, match=message):
            softce.cross_entropy(x, y, row_loss=phi, reduction=reduction, options=options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["indices", "weighted indices", "probs", "mixup", "topk", "teacher"])
def test_focal_alpha_for_each_class(form: str, reduction: str, options: softce.Options) -> None:
    n, c = 7, 5
    x = torch.randn(n, c, dtype=torch.float64)
    alpha, weight = torch.rand(c, dtype=torch.float64), None
    y = torch.randint(c, (n,))
    counted = torch.ones(n, dtype=torch.float64)
    target: Any = y
    dense = F.one_hot(y, c).double()
    if form == "indices":
        target = torch.where(torch.arange(n) == 2, -100, y)
        dense[2], counted[2] = 0.0, 0.0
    elif form == "weighted indices":
        weight = torch.rand(c, dtype=torch.float64) + 0.5
        counted = weight[y]
    elif form == "probs":
        target = dense = torch.softmax(torch.randn(n, c, dtype=torch.float64), 1)
    elif form == "mixup":
        target, dense = softce.Mixup(y, y.flip(0), 0.3), 0.3 * dense + 0.7 * dense.flip(0)
    elif form == "topk":
        index = torch.stack((y, (y + 1) % c), 1)
        target = softce.TopK(index, torch.full((n, 2), 0.3, dtype=torch.float64), rest="uniform")
        dense = torch.full((n, c), 0.4 / (c - 2), dtype=torch.float64).scatter(1, index, 0.3)
    else:
        logits = torch.randn(n, c, dtype=torch.float64)
        target, dense = softce.Teacher(logits, 2.0), torch.softmax(logits / 2, 1)
    row_weight = torch.rand(n, dtype=torch.float64) + 0.1
    results = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        if ours:
            loss = softce.cross_entropy(
                leaf,
                target,
                weight,
                reduction=reduction,
                row_loss=softce.Focal(2.0, alpha),
                row_weight=row_weight,
                options=options,
            )
        else:
            q = dense if weight is None else dense * weight
            each = -(q * F.log_softmax(leaf, 1)).sum(1)
            each = row_weight * (dense @ alpha) * (1 - torch.exp(-each)) ** 2 * each
            loss = each if reduction == "none" else each.sum()
            loss = loss / (row_weight * counted).sum() if reduction == "mean" else loss
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_focal_alpha_edges(options: softce.Options) -> None:
    x, y = torch.randn(3, 4), torch.full((3,), -100)
    alpha = torch.rand(4)
    nothing = softce.cross_entropy(x, y, row_loss=softce.Focal(2.0, alpha), options=options)
    assert isinstance(nothing, Tensor) and nothing.isnan()
    zero = softce.cross_entropy(x, y, row_loss=softce.Focal(2.0, alpha), empty="zero", options=options)
    assert isinstance(zero, Tensor) and zero.item() == 0.0
    rows = torch.randn(0, 4, requires_grad=True)
    for reduction, want in (("mean", math.nan), ("sum", 0.0)):
        loss = softce.cross_entropy(
            rows, y[:0], row_loss=softce.Focal(2.0, alpha), reduction=reduction, options=options
        )
        torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
    with pytest.raises(ValueError, match="4 classes, got 3"):
        softce.cross_entropy(
            x, torch.zeros(3, dtype=torch.int64), row_loss=softce.Focal(2.0, alpha[:3]), options=options
        )
    with pytest.raises(RuntimeError, match=r"row_loss: expected its factors by class on cpu, .* got meta"):
        softce.cross_entropy(x, y, row_loss=softce.Focal(2.0, alpha.to("meta")), options=options)
    with pytest.raises(TypeError, match="needs the target"):
        softce.Focal(2.0, alpha)(torch.rand(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: softce.Focal(-1.0), "gamma"),
        (lambda: softce.Focal(math.nan), "gamma"),
        (lambda: softce.Focal(2.0, -0.1), "alpha"),
        (lambda: softce.Focal(2.0, torch.tensor([0.5, -0.5])), "alpha"),
        (lambda: softce.Focal(2.0, torch.rand(2, 2)), "alpha"),
        (lambda: softce.LabelRelaxation(1.0), "alpha"),
        (lambda: softce.LabelRelaxation(-0.1), "alpha"),
        (lambda: softce.LabelRelaxation(math.nan), "alpha"),
        (lambda: softce.GeneralizedCrossEntropy(0.0), "q"),
        (lambda: softce.GeneralizedCrossEntropy(1.1), "q"),
        (lambda: softce.Poly1(math.inf), "epsilon"),
    ],
)
def test_parameters_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", ["2", None, [2.0], torch.tensor(2.0, requires_grad=True)])
def test_parameters_are_numbers(value: Any) -> None:
    """A tensor would be a constant in silence: nothing would come back to it."""
    for make, name in (
        (softce.Focal, "Focal: gamma"),
        (softce.LabelRelaxation, "LabelRelaxation: alpha"),
        (softce.GeneralizedCrossEntropy, "GeneralizedCrossEntropy: q"),
        (softce.Poly1, "Poly1: epsilon"),
        (lambda t: softce.Teacher(torch.rand(2, 3), t), "Teacher: temperature"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be float, not {type(value).__name__}"):
            make(value)


def test_second_derivatives(options: softce.Options) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 4, -100, 2])
    for row_loss in (
        softce.Focal(0.5),
        softce.Focal(2.0),
        softce.LabelRelaxation(0.1),
        softce.GeneralizedCrossEntropy(0.3),
        softce.Poly1(-0.5),
    ):
        assert torch.autograd.gradcheck(
            lambda x, r=row_loss: softce.cross_entropy(x, y, row_loss=r, options=options), (x,)
        )
        assert torch.autograd.gradgradcheck(
            lambda x, r=row_loss: softce.cross_entropy(x, y, row_loss=r, options=options), (x,)
        )
