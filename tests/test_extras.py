# SPDX-License-Identifier: BSD-3-Clause
"""What ``softce.cross_entropy`` takes besides torch's arguments; values of each are in the table too."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, TARGETS, Case
from checks import assert_rounded_once, kernel_calls, run
from oracle import evaluate
from torch import Tensor

import softce
from softce import Options

by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
D = torch.float64


# ---- smoothing ----


@by_reduction
def test_smoothing_others_against_explicit_targets(reduction: str, options: Options) -> None:
    """e is shared by the C - 1 classes besides the target."""
    x, y, e = torch.randn(5, 7, dtype=D), torch.randint(7, (5,)), 0.3
    t = torch.full((5, 7), e / 6, dtype=D).scatter_(1, y[:, None], 1 - e)
    want = run(F.cross_entropy, x, t, reduction=reduction)
    kwargs = {"label_smoothing": e, "smoothing": "others", "reduction": reduction, "options": options}
    torch.testing.assert_close(run(softce.cross_entropy, x, y, **kwargs), want)
    torch.testing.assert_close(run(softce.cross_entropy, x, F.one_hot(y, 7).to(D), **kwargs), want)


def test_smoothing_others_of_soft_targets(options: Options) -> None:
    """t' = (1 - e) t + e / (C - 1) (1 - t), whatever t sums to."""
    x, t, e = torch.randn(5, 7, dtype=D), torch.rand(5, 7, dtype=D), 0.3
    want = run(F.cross_entropy, x, (1 - e) * t + e / 6 * (1 - t))
    got = run(softce.cross_entropy, x, t, label_smoothing=e, smoothing="others", options=options)
    torch.testing.assert_close(got, want)


def test_smoothing_of_one_class(options: Options) -> None:
    """There are no other classes to give e to."""
    x, y = torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)
    for smoothing in ("uniform", "others"):
        loss, grad = run(softce.cross_entropy, x, y, label_smoothing=0.2, smoothing=smoothing, options=options)
        torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
        torch.testing.assert_close(grad, torch.zeros(3, 1), rtol=0, atol=1e-6)


# ---- transforms of the logits ----


@by_reduction
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_temperature_and_softcap_against_transformed_logits(dense: bool, reduction: str, options: Options) -> None:
    base = 6 * torch.randn(5, 7, dtype=D)
    t = torch.rand(5, 7, dtype=D) if dense else torch.tensor([0, -100, 3, 2, 6])

    def by_hand(x: Tensor) -> Tensor:
        return F.cross_entropy(4.0 * torch.tanh(x / 4.0) / 1.7, t, reduction=reduction, label_smoothing=0.1)

    want = run(by_hand, base)
    got = run(
        softce.cross_entropy,
        base,
        t,
        reduction=reduction,
        label_smoothing=0.1,
        softcap=4.0,
        temperature=1.7,
        options=options,
    )
    torch.testing.assert_close(got, want)


@by_reduction
def test_z_loss_by_hand(reduction: str, options: Options) -> None:
    """Once a row, whatever the row's target weighs; not in ignored rows."""
    base, y, w = torch.randn(5, 7, dtype=D), torch.tensor([0, -100, 3, 2, 6]), torch.rand(7, dtype=D)

    def by_hand(x: Tensor) -> Tensor:
        rows = F.cross_entropy(x, y, w, reduction="none") + 0.01 * (y != -100) * x.logsumexp(1) ** 2
        total = w[y[y != -100]].sum()
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / total}[reduction]

    got = run(softce.cross_entropy, base, y, w, reduction=reduction, z_loss=0.01, options=options)
    torch.testing.assert_close(got, run(by_hand, base))


def test_no_softcap_is_none_or_zero(options: Options) -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    want = softce.cross_entropy(x, y, options=options)
    for none in (None, 0, 0.0):
        assert torch.equal(softce.cross_entropy(x, y, softcap=none, options=options), want)


def test_softcap_tames_huge_logits(options: Options) -> None:
    """tanh saturates: no nan, no inf, and a gradient of 0 there."""
    x = torch.tensor([[1e30, -1e30, 0.5, 3e38], [torch.inf, -torch.inf, 0.1, 0.2]])
    loss, grad = run(softce.cross_entropy, x, torch.tensor([1, 0]), softcap=5.0, options=options)
    want = F.cross_entropy(5 * torch.tanh(x.double() / 5), torch.tensor([1, 0]))
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    assert torch.equal(grad[0, :2], torch.zeros(2)) and grad.isfinite().all()


# ---- loss_dtype and empty ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_dtype", DTYPES)
@by_reduction
def test_loss_dtype(dtype: torch.dtype, loss_dtype: torch.dtype, reduction: str, options: Options) -> None:
    """The loss is rounded once, to that dtype: a float32 loss of half logits keeps all of its digits."""
    x, y = torch.randn(5, 7).to(dtype), torch.randint(7, (5,))
    want = evaluate(x, y, reduction=reduction)
    loss, grad = run(softce.cross_entropy, x, y, reduction=reduction, loss_dtype=loss_dtype, options=options)
    assert loss.dtype == loss_dtype
    reached = loss if loss_dtype != D or dtype == D else loss.float()  # widened from float32
    assert_rounded_once(reached, want.loss)
    assert_rounded_once(grad, want.grad)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_empty_zero(weighted: bool, smoothing: float, options: Options) -> None:
    """Every row ignored, no row at all, or rows that weigh nothing: mean is 0 with a gradient of 0."""
    w = torch.tensor([0.0, 1.0, 2.0, 3.0]) if weighted else None
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (torch.randn(3, 4), torch.full((3,), -100), {}),
        (torch.randn(0, 4), torch.zeros(0, dtype=torch.int64), {}),
        (torch.randn(2, 4, 0), torch.zeros(2, 0, dtype=torch.int64), {}),
        (torch.randn(0, 4), torch.rand(0, 4), {}),
        (torch.randn(3, 4), torch.tensor([0, 1, 2]), {"row_weight": torch.zeros(3)}),
        (torch.randn(3, 4), torch.rand(3, 4), {"row_weight": torch.zeros(3)}),
    ]
    if weighted:
        calls.append((torch.randn(3, 4), torch.tensor([0, 0, -100]), {}))
    for x, t, more in calls:
        kwargs = {"weight": w, "label_smoothing": smoothing, "options": options, **more}
        loss, grad = run(softce.cross_entropy, x, t, empty="zero", **kwargs)
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(x))
        assert softce.cross_entropy(x, t, empty="nan", **kwargs).isnan() or (weighted and smoothing)


def test_empty_zero_changes_nothing_else(options: Options) -> None:
    x, y = torch.randn(5, 7), torch.tensor([0, -100, 3, 2, 6])
    for reduction in ("mean", "sum", "none"):
        want = run(softce.cross_entropy, x, y, reduction=reduction, options=options)
        got = run(softce.cross_entropy, x, y, reduction=reduction, empty="zero", options=options)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


# ---- row_weight ----


@by_reduction
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3), (2, 5, 2, 2)], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_row_weight_by_hand(shape: Any, dense: bool, reduction: str, options: Options) -> None:
    """mean is the weighted mean: it divides by the weights, times the class weights for class indices."""
    rows = (shape[0], *shape[2:])
    base, w, r = torch.randn(shape, dtype=D), torch.rand(5, dtype=D), torch.rand(rows, dtype=D)
    y = torch.randint(5, rows)
    y.view(-1)[1] = -100
    t = torch.rand(shape, dtype=D) if dense else y
    counts = torch.ones(rows, dtype=D) if dense else torch.where(y == -100, 0, w[y.clamp(min=0)])

    def by_hand(x: Tensor) -> Tensor:
        each = r * F.cross_entropy(x, t, w, reduction="none", label_smoothing=0.1)
        return {"none": each, "sum": each.sum(), "mean": each.sum() / (r * counts).sum()}[reduction]

    kwargs = {"weight": w, "label_smoothing": 0.1, "row_weight": r, "reduction": reduction, "options": options}
    torch.testing.assert_close(run(softce.cross_entropy, base, t, **kwargs), run(by_hand, base))


def test_row_weight_of_an_unbatched_row(options: Options) -> None:
    x, y = torch.randn(5), torch.tensor(2)
    got = softce.cross_entropy(x, y, row_weight=torch.tensor(0.25), reduction="sum", options=options)
    torch.testing.assert_close(got, 0.25 * F.cross_entropy(x, y))


def test_row_weight_has_a_gradient(options: Options) -> None:
    x, y = torch.randn(5, 7, dtype=D, requires_grad=True), torch.tensor([0, -100, 3, 2, 6])
    r = torch.rand(5, dtype=D, requires_grad=True)

    def loss(x: Tensor, r: Tensor) -> Tensor:
        return softce.cross_entropy(x, y, row_weight=r, label_smoothing=0.1, options=options)

    torch.autograd.gradcheck(loss, (x, r))


# ---- statistics ----


STATS_CASES = [
    Case(shape, target, options, weight=weight)
    for shape in ((5, 11), (70, 10), (2, 4099), (2, 5, 7), (1, 20011), (7,))
    for target in ("ignored", "probs")
    for options, weight in (("plain", False), ("everything", True), ("none", False))
] + [Case((5, 11), target, "smoothed", weight=True) for target in TARGETS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", STATS_CASES, ids=lambda c: c.name)
def test_statistics(case: Case, dtype: torch.dtype, options: Options) -> None:
    """lse and entropy of the transformed logits; the target's log-probability without weights and smoothing."""
    input, target, kwargs = case.make("cpu", dtype)
    want = evaluate(input, target, **kwargs)
    leaf = input.clone().requires_grad_()
    loss, stats = softce.cross_entropy(leaf, target, return_stats=True, options=options, **kwargs)
    assert_rounded_once(loss, want.loss, what="loss", scale=want.loss_scale)
    acc = D if dtype == D else torch.float32
    for name in ("lse", "target_log_prob", "entropy"):
        got = getattr(stats, name)
        assert got.dtype == acc and got.shape == want.lse.shape
        # Sums of terms that reach a few units each; lse is as large as the logits themselves.
        assert_rounded_once(got, getattr(want, name), what=name, scale=4.0, logits_dtype=dtype)
    assert stats.correct.dtype == torch.bool and torch.equal(stats.correct, want.correct)
    if case.reduction != "none":
        loss.backward()
        torch.testing.assert_close(
            leaf.grad.double(), want.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


def test_statistics_cost_no_second_pass(cpu_kernels: None) -> None:
    x, y = torch.randn(8, 16, requires_grad=True), torch.arange(8)
    with kernel_calls() as calls:
        softce.cross_entropy(x, y, return_stats=True)[0].backward()
    assert calls == {"row_fused": 1}
    with kernel_calls() as calls, torch.no_grad():
        softce.cross_entropy(x, y, return_stats=True)
    assert calls == {"row_stats": 1}


def test_correct_takes_the_first_of_equals(options: Options) -> None:
    x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    _, stats = softce.cross_entropy(x, torch.tensor([0, 2, 0]), return_stats=True, options=options)
    assert stats.correct.tolist() == [True, False, True]
    t = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    _, stats = softce.cross_entropy(x, t, return_stats=True, options=options)
    assert stats.correct.tolist() == [True, True, False]


@pytest.mark.parametrize("target", ["ignored", "probs", "topk", "mixup_rows"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.2, "temperature": 1.5, "softcap": 9.0, "z_loss": 0.01}])
def test_gradients_through_statistics(target: str, reduction: str, extra: dict[str, Any], options: Options) -> None:
    """Each alone and all together with the loss, against finite differences; their second derivatives too."""
    input, t, _ = Case((3, 6), target).make("cpu", D)
    input = (input / 4).requires_grad_()

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        loss, stats = softce.cross_entropy(x, t, reduction=reduction, return_stats=True, options=options, **extra)
        return loss, stats.lse, stats.target_log_prob, stats.entropy

    assert torch.autograd.gradcheck(everything, (input,))
    assert torch.autograd.gradgradcheck(everything, (input,))
    for i in range(4):
        (got,) = torch.autograd.grad(everything(input)[i].sum(), input)
        (want,) = torch.autograd.grad(everything(input)[i].sum(), input, create_graph=True)
        torch.testing.assert_close(got, want)


def test_statistics_of_no_rows(options: Options) -> None:
    loss, stats = softce.cross_entropy(
        torch.randn(0, 4), torch.zeros(0, dtype=torch.int64), return_stats=True, options=options
    )
    assert loss.isnan() and all(s.shape == (0,) for s in stats)


def test_entropy_bonus_training_step(options: Options) -> None:
    """A loss made of the statistics alone."""
    x, y = torch.randn(6, 9, requires_grad=True), torch.randint(9, (6,))
    _, stats = softce.cross_entropy(x, y, return_stats=True, options=options)
    (-stats.target_log_prob.mean() - 0.1 * stats.entropy.mean()).backward()
    z = x.detach().clone().requires_grad_()
    logp = z.log_softmax(1)
    (-logp[torch.arange(6), y].mean() + 0.1 * (logp.exp() * logp).sum(1).mean()).backward()
    torch.testing.assert_close(x.grad, z.grad)


# ---- options ----


def test_options_say_no() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'gpu'"):
        Options(backend="gpu")
    with pytest.raises(ValueError, match="memory_budget"):
        Options(memory_budget=0)
    with pytest.raises(AttributeError):  # frozen
        Options().inplace = True  # type: ignore[misc]


def test_a_backend_asked_for_by_name_runs_or_says_why_not(cpu_kernels: None) -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for name in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run.*cpu"):
            softce.cross_entropy(x, y, options=Options(backend=name))
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run.*(forward-mode|torch\.func)"):
        torch.func.grad(lambda x: softce.cross_entropy(x, y, options=Options(backend="cpu")))(x)
    with kernel_calls() as calls:
        softce.cross_entropy(x, y, options=Options(backend="cpu"))
    assert calls == {"row_stats": 1}


@pytest.mark.parametrize("dtype, reduction", [(torch.float32, "none"), (torch.float16, "mean")])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3)])
def test_inplace_logits_cannot_be_used_after_backward(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, cpu_kernels: None
) -> None:
    """Where the gradient is written in backward, the logits still serve until then, and raise from then on."""
    x, y = torch.randn(shape).to(dtype), torch.randint(4, (shape[0], *shape[2:]))
    (want,) = torch.autograd.grad(F.cross_entropy(leaf := x.double().requires_grad_(), y, reduction="sum"), leaf)
    scale = y.numel() if reduction == "mean" else 1
    uses = (lambda h: h.sum(), lambda h: (h * h).sum(), lambda h: softce.cross_entropy(h, y), lambda h: h.exp().sum())
    for use in uses:
        leaf = x.clone().requires_grad_()
        logits = leaf * 1.0
        before = logits.sum()
        softce.cross_entropy(logits, y, reduction=reduction, options=Options(inplace=True)).sum().backward(
            retain_graph=True
        )
        assert_rounded_once(leaf.grad, want / scale)
        with pytest.raises(RuntimeError, match=r"overwritten by their gradient|modified by an inplace operation"):
            use(logits).backward()
        before.backward()  # it needs none of the values
        torch.testing.assert_close(leaf.grad.double(), want / scale + 1.0, rtol=2e-3, atol=2e-3)


def test_auto_explains_itself(cpu_kernels: None) -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        softce.cross_entropy(x, y, options=Options(explain=True))
    with pytest.warns(UserWarning, match=r"plain PyTorch formula.*torch\.func"):
        torch.func.grad(lambda x: softce.cross_entropy(x, y, options=Options(explain=True)))(x)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "smoothing": ({"smoothing": "both"}, ValueError, "smoothing must be 'uniform' or 'others', got 'both'"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    "temperature negative": ({"temperature": -1.0}, ValueError, "temperature"),
    "temperature nan": ({"temperature": math.nan}, ValueError, "temperature"),
    "temperature infinite": ({"temperature": math.inf}, ValueError, "temperature"),
    "softcap": ({"softcap": -2.0}, ValueError, "softcap must be positive"),
    "softcap nan": ({"softcap": math.nan}, ValueError, "softcap"),
    "softcap infinite": ({"softcap": math.inf}, ValueError, "softcap"),
    "z_loss": ({"z_loss": -1e-4}, ValueError, "z_loss must be finite and not negative, got -0.0001"),
    "z_loss nan": ({"z_loss": math.nan}, ValueError, "z_loss"),
    "z_loss infinite": ({"z_loss": math.inf}, ValueError, "z_loss"),
    "empty": ({"empty": "none"}, ValueError, "empty must be 'nan' or 'zero', got 'none'"),
    "row_weight shape": ({"row_weight": torch.rand(4)}, ValueError, r"row_weight must have shape \[3\], got \[4\]"),
    "row_weight 2d": ({"row_weight": torch.rand(3, 1)}, ValueError, "row_weight"),
    "row_weight type": ({"row_weight": [1.0, 1.0, 1.0]}, TypeError, "row_weight must be Tensor"),
    "temperature type": ({"temperature": "hot"}, TypeError, "temperature"),
    "temperature tensor": ({"temperature": torch.tensor(2.0, requires_grad=True)}, TypeError, "temperature"),
    "temperature list": ({"temperature": [2.0]}, TypeError, "temperature must be float, not list"),
    "smoothing list": ({"smoothing": ["uniform"]}, ValueError, "smoothing must be"),
    "z_loss type": ({"z_loss": None}, TypeError, "z_loss"),
    "softcap type": ({"softcap": "30"}, TypeError, "softcap"),
    "loss_dtype": ({"loss_dtype": torch.int64}, TypeError, "loss_dtype"),
    "row_loss type": ({"row_loss": "focal"}, TypeError, "row_loss"),
    "options type": ({"options": {"backend": "cpu"}}, TypeError, "options"),
    "unknown": ({"lable_smoothing": 0.1}, TypeError, "lable_smoothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, backend: str) -> None:
    """Each error names the argument, what was expected and what came."""
    kwargs, kind, message = BAD[name]
    kwargs = {"options": Options(backend=backend), **kwargs}
    x, y = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    for arguments in (kwargs, BAD[name][0]):
        with pytest.raises(kind, match=message):
            softce.cross_entropy(x, y, **arguments)


def test_the_module_takes_every_extra() -> None:
    extras = [p.name for p in inspect.signature(softce.cross_entropy).parameters.values() if p.kind is p.KEYWORD_ONLY]
    held = softce.CrossEntropyLoss(temperature=2.0, return_stats=True)
    for name in extras:
        assert name == "row_weight" or hasattr(held, name), name
    x, y, r = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.rand(3)
    loss, stats = held(x, y, row_weight=r)
    want, want_stats = softce.cross_entropy(x, y, temperature=2.0, return_stats=True, row_weight=r)
    assert torch.equal(loss, want) and torch.equal(stats.lse, want_stats.lse)
