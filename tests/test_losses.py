# SPDX-License-Identifier: BSD-3-Clause
"""Losses under the field's names, against the formulas they are known by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softce


def _both(ours: Any, own: Any, x: Tensor) -> None:
    """The same value and gradient."""
    found = []
    for f in (ours, own):
        leaf = x.detach().clone().requires_grad_()
        value = f(leaf)
        found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def _soft(*shape: int, dim: int = 1) -> Tensor:
    return torch.softmax(torch.randn(*shape, dtype=torch.float64), dim)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 2, 2)])
def test_kl_div_equals_torch(shape: tuple[int, ...], reduction: str) -> None:
    x, t = torch.randn(shape, dtype=torch.float64), _soft(*shape)
    t[0, 0] = 0.0  # 0 log 0 = 0
    _both(
        lambda x: softce.kl_div_loss(x, t, reduction=reduction),
        lambda x: F.kl_div(F.log_softmax(x, 1), t, reduction=reduction),
        x,
    )
    _both(
        lambda x: softce.kl_div_loss(x, t.clamp_min(1e-3).log(), reduction=reduction, log_target=True),
        lambda x: F.kl_div(F.log_softmax(x, 1), t.clamp_min(1e-3).log(), reduction=reduction, log_target=True),
        x,
    )


def test_kl_div_rows_weights_smoothing_and_unbatched(options: softce.Options) -> None:
    x, t, w = torch.randn(4, 5, 3, dtype=torch.float64), _soft(4, 5, 3), torch.rand(5, dtype=torch.float64)
    smoothed = 0.8 * t + 0.2 / 5
    terms = smoothed * (smoothed.log() - F.log_softmax(x / 2, 1))
    arguments: dict[str, Any] = {"label_smoothing": 0.2, "temperature": 2.0, "options": options}
    torch.testing.assert_close(softce.kl_div_loss(x, t, reduction="row", **arguments), terms.sum(1))
    torch.testing.assert_close(softce.kl_div_loss(x, t, w, **arguments), (terms * w[:, None]).sum() / 4)
    one = softce.kl_div_loss(x[0, :, 0], t[0, :, 0], options=options)
    torch.testing.assert_close(one, F.kl_div(F.log_softmax(x[0, :, 0], 0), t[0, :, 0], reduction="sum"))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", ["indices", "mixup", "topk", "topk uniform", "teacher"])
def test_kl_div_from_every_form(form: str, smoothing: float, weighted: bool, options: softce.Options) -> None:
    n, c = 6, 5
    x = torch.randn(n, c, dtype=torch.float64)
    a, b = torch.arange(n) % c, torch.tensor([0, 1, 1, 2, 0, 3])  # pairs of one class too
    hot = F.one_hot(torch.stack((a, b)), c).double()
    forms: dict[str, tuple[Any, Tensor]] = {
        "indices": (a, hot[0]),
        "mixup": (softce.Mixup(a, b, 0.25), 0.25 * hot[0] + 0.75 * hot[1]),
        "teacher": (softce.Teacher(2 * x.flip(0), 2.0), torch.softmax(x.flip(0), 1)),
    }
    index = torch.stack((a, b, torch.full_like(a, -1)), 1)
    prob = torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64).expand(n, 3)
    top = 0.5 * hot[0] + 0.3 * hot[1]
    forms["topk"] = (softce.TopK(index, prob), top)
    spread = 0.2 / (top == 0).sum(1, keepdim=True)
    forms["topk uniform"] = (softce.TopK(index, prob, rest="uniform"), torch.where(top == 0, spread, top))
    weight = torch.rand(c, dtype=torch.float64) if weighted else None
    target, dense = forms[form]
    for reduction in ("batchmean", "row"):
        arguments = {"label_smoothing": smoothing, "reduction": reduction, "options": options}
        _both(
            lambda x, a=arguments: softce.kl_div_loss(x, target, weight, **a),
            lambda x, a=arguments: softce.kl_div_loss(x, dense, weight, **a),
            x,
        )


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_kl_div_of_nothing(shape: tuple[int, ...], reduction: str) -> None:
    x, t = torch.zeros(shape, requires_grad=True), torch.zeros(shape)
    loss = softce.kl_div_loss(x, t, reduction=reduction)
    torch.testing.assert_close(loss, F.kl_div(x, t, reduction=reduction), equal_nan=True)
    loss.sum().backward()
    if reduction != "none":
        assert softce.kl_div_loss(x, t, reduction=reduction, empty="zero").item() == 0.0


def test_kl_div_of_ignored_rows_and_bad_arguments() -> None:
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, -100, 2])
    rows = softce.kl_div_loss(x, y, reduction="row", label_smoothing=0.1)
    assert rows[1].item() == 0.0 and (rows[[0, 2]] > 0).all()
    with pytest.raises(ValueError, match="batchmean"):
        softce.kl_div_loss(x, _soft(3, 4), reduction="average")
    with pytest.raises(ValueError, match="reduction='row'"):
        softce.kl_div_loss(x, y, reduction="none")
    with pytest.raises(TypeError, match="log_target"):
        softce.kl_div_loss(x, softce.Teacher(x), log_target=True)
    with pytest.raises(TypeError, match="return_stats"):
        softce.kl_div_loss(x, _soft(3, 4), return_stats=True)
    for reduction in ("batchmean", "none"):
        with pytest.raises(TypeError, match="input must be Tensor, not list"):
            softce.kl_div_loss([0.5, 0.5], _soft(1, 2), reduction=reduction)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="input must be float64"):
            softce.kl_div_loss(x.long(), _soft(3, 4), reduction=reduction)
        with pytest.raises(RuntimeError, match="got a scalar"):
            softce.kl_div_loss(x[0, 0], x[0, 0], reduction=reduction)
    for module in (softce.LabelSmoothingLossCanonical, softce.LabelSmoothingCrossEntropy):
        with pytest.raises(TypeError, match="smoothing must be float, not str"):
            module("0.1")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kl_div_by_class_rounds_once(dtype: torch.dtype) -> None:
    x, t = (3 * torch.randn(5, 100)).to(dtype).requires_grad_(), _soft(5, 100).to(dtype)
    exact = F.kl_div(F.log_softmax(x.detach().double(), 1), t.double(), reduction="none")
    loss = softce.kl_div_loss(x, t, reduction="none")
    assert loss.dtype is dtype
    # float32 cancellation leaves an error of its own where log t is near log p.
    torch.testing.assert_close(loss.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-7)
    with pytest.raises(RuntimeError, match="floating point"):
        softce.kl_div_loss(x, torch.ones(5, 100, dtype=torch.int64), reduction="none")
    with pytest.warns(UserWarning, match="negative"):
        softce.kl_div_loss(x, t - 1, reduction="none")


def test_label_smoothing_by_hand_equals_the_built_in() -> None:
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    smoothed = torch.full((6, 5), 0.1 / 5, dtype=torch.float64).scatter_(1, y[:, None], 0.9 + 0.1 / 5)
    entropy = -(smoothed * smoothed.log()).sum() / 6
    want = softce.cross_entropy(x, y, label_smoothing=0.1)
    torch.testing.assert_close(F.kl_div(F.log_softmax(x, 1), smoothed, reduction="batchmean") + entropy, want)
    torch.testing.assert_close(softce.kl_div_loss(x, y, label_smoothing=0.1) + entropy, want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_canonical(smoothing: float) -> None:
    loss = softce.LabelSmoothingLossCanonical(smoothing)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    t = (1 - smoothing) * F.one_hot(y, 5).double() + smoothing / 5
    _both(lambda x: loss(x, y), lambda x: -(t * F.log_softmax(x, -1)).sum(-1).mean(), x)
    soft = _soft(6, 5)
    want = F.cross_entropy(x, soft, label_smoothing=smoothing)
    torch.testing.assert_close(loss(x, soft), want)


def test_class_dimension_of_the_named_losses() -> None:
    x, y = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(5, (2, 3, 4))
    want = F.cross_entropy(x.movedim(-1, 1), y, label_smoothing=0.1)
    torch.testing.assert_close(softce.LabelSmoothingLossCanonical(0.1)(x, y), want)
    torch.testing.assert_close(softce.LabelSmoothingLossCanonical(0.1, dim=1)(x.movedim(-1, 1), y), want)
    soft = _soft(2, 3, 4, 5, dim=-1)
    torch.testing.assert_close(softce.SoftTargetCrossEntropy()(x, soft), -(soft * F.log_softmax(x, -1)).sum(-1).mean())
    with pytest.raises(IndexError, match="dim must be"):
        softce.LabelSmoothingLossCanonical(0.1, dim=4)(x, y)


def _relaxed(prob: Tensor, y: Tensor, alpha: float) -> Tensor:
    """From the definition: the divergence from the nearest distribution that gives y at least 1 - alpha."""
    rows = torch.arange(len(y))
    p = prob[rows, y]
    others = prob / (1 - p)[:, None] * alpha
    others[rows, y] = 1 - alpha
    divergence = (others * (others / prob).log()).sum(1)
    return torch.where(p > 1 - alpha, 0.0, divergence).mean()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.4])
def test_label_relaxation_in_every_form(alpha: float) -> None:
    x, y = 3 * torch.randn(12, 5, dtype=torch.float64), torch.randint(5, (12,))
    hot = F.one_hot(y, 5)
    prob = torch.softmax(x, 1)
    want = _relaxed(prob, y, alpha)
    make = softce.LabelRelaxationLoss
    for one_hot in (hot, hot.double()):
        torch.testing.assert_close(make(alpha)(x, one_hot), want)
        torch.testing.assert_close(make(alpha, logits_provided=False)(prob, one_hot), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(make(alpha, -1, True, True, 5)(x, y), want)
    torch.testing.assert_close(make(alpha, one_hot_encode_trgts=True)(x, y), want)
    torch.testing.assert_close(make(alpha)(x, y), want)
    assert torch.autograd.gradcheck(lambda x: make(alpha)(x, y), (x.requires_grad_(),))


def test_label_relaxation_arguments() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="alpha"):
        softce.LabelRelaxationLoss(1.0)
    with pytest.raises(ValueError, match="num_classes is 4"):
        softce.LabelRelaxationLoss(one_hot_encode_trgts=True, num_classes=4)(x, y)
    with pytest.raises(ValueError, match="expects class indices"):
        softce.LabelRelaxationLoss(one_hot_encode_trgts=True)(x, F.one_hot(y, 3))
    with pytest.raises(ValueError, match="smoothing"):
        softce.LabelSmoothingLossCanonical(1.5)
    with pytest.raises(ValueError, match="smoothing"):
        softce.LabelSmoothingCrossEntropy(-0.1)


def test_timm_losses() -> None:
    x, y, soft = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,)), _soft(6, 5)
    _both(lambda x: softce.SoftTargetCrossEntropy()(x, soft), lambda x: F.cross_entropy(x, soft), x)
    _both(lambda x: softce.LabelSmoothingCrossEntropy()(x, y), lambda x: F.cross_entropy(x, y, label_smoothing=0.1), x)


# ---- probabilities as input ----


def _keras_log(prob: Tensor) -> Tensor:
    return torch.log(torch.clamp(prob / prob.sum(1, keepdim=True), 1e-7, 1 - 1e-7))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_from_probs(reduction: str, options: softce.Options) -> None:
    prob = torch.rand(6, 5, dtype=torch.float64)
    prob[0] = torch.tensor([1.0, 0, 0, 0, 0])
    prob[1, 2] = 0.0
    y, w = torch.tensor([1, 2, -100, 3, 4, 0]), torch.rand(5, dtype=torch.float64)
    soft = _soft(6, 5)
    for weight in (None, w):
        _both(
            lambda p, w=weight: softce.cross_entropy(p, y, w, reduction=reduction, from_probs=True, options=options),
            lambda p, w=weight: F.nll_loss(_keras_log(p), y, w, reduction=reduction),
            prob,
        )

    def by_hand(p: Tensor) -> Tensor:
        each = -((0.9 * soft + 0.02) * _keras_log(p)).sum(1)
        each = (1 - torch.exp(-each)) ** 2 * each
        return each if reduction == "none" else each.sum() / (6 if reduction == "mean" else 1)

    arguments: dict[str, Any] = {"label_smoothing": 0.1, "row_loss": softce.Focal(2.0), "options": options}
    _both(lambda p: softce.cross_entropy(p, soft, reduction=reduction, from_probs=True, **arguments), by_hand, prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_probs_is_finite(dtype: torch.dtype) -> None:
    prob = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e-30, 1.0, 1e-30]]).to(dtype).requires_grad_()
    loss = softce.cross_entropy(prob, torch.tensor([0, 1, 2]), from_probs=True)
    assert isinstance(loss, Tensor) and loss.dtype == dtype
    (grad,) = torch.autograd.grad(loss, prob)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_from_probs_with_other_shapes_and_forms() -> None:
    prob = _soft(2, 4, 3)
    y = torch.randint(4, (2, 3))
    want = F.cross_entropy(prob.log(), y)
    torch.testing.assert_close(softce.cross_entropy(prob, y, from_probs=True), want, rtol=1e-6, atol=1e-6)
    module = softce.CrossEntropyLoss(from_probs=True)
    torch.testing.assert_close(module(prob, y), want, rtol=1e-6, atol=1e-6)
    pair = softce.Mixup(y, y.flip(0), 0.5)
    want = softce.cross_entropy(prob.log(), pair)
    torch.testing.assert_close(softce.cross_entropy(prob, pair, from_probs=True), want, rtol=1e-6, atol=1e-6)
    for arguments in ({"temperature": 2.0}, {"softcap": 5.0}, {"z_loss": 0.1}):
        with pytest.raises(ValueError, match="from_probs"):
            softce.cross_entropy(prob, y, from_probs=True, **arguments)
    with pytest.warns(UserWarning, match="from_probs=True takes probabilities"):
        softce.cross_entropy(torch.randn(3, 4) - 5, torch.tensor([0, 1, 2]), from_probs=True)
