# SPDX-License-Identifier: BSD-3-Clause
"""Everything that autograd, ``torch.func`` and tensor subclasses do with torch's function works with softce's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autograd_inputs import TARGET_FORMS, D, T, W, X, Y, by_reduction
from cases import ROW_LOSSES, TARGETS, Case
from checks import assert_rounded_once, run, same
from oracle import evaluate
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import softce
from softce import Options

# What a loss can be differentiated in: every target form, option and row loss at a small size.
GRAD_CASES = [
    *(Case((3, 4), target, options) for target in TARGETS for options in ("plain", "none")),
    *(Case((2, 3, 2), target) for target in ("ignored", "probs", "topk", "mixup_samples", "teacher")),
    *(
        Case((3, 4), t, o, weight=True)
        for t in ("ignored", "probs", "topk_uniform")
        for o in ("smoothed", "everything")
    ),
    *(Case((3, 4), "ignored", "smoothed_sum", row_loss=row_loss) for row_loss in ROW_LOSSES),
    *(Case((3, 4), "mixup", "everything_none", row_loss=row_loss, row_weight=True) for row_loss in ROW_LOSSES),
    Case((5,)),
    Case((5,), "probs", "smoothed"),
]
by_case = pytest.mark.parametrize("case", GRAD_CASES, ids=lambda c: c.name)


def made(case: Case) -> tuple[Tensor, Any, dict[str, Any]]:
    """The case in float64 with logits of a few units: finite differences have to see the whole softmax."""
    input, target, kwargs = case.make("cpu", D)
    return (input / 6).requires_grad_(), target, kwargs


# ---- first and second derivatives against finite differences ----


@by_case
def test_gradcheck(case: Case, options: Options) -> None:
    input, target, kwargs = made(case)
    assert gradcheck(lambda x: softce.cross_entropy(x, target, options=options, **kwargs), (input,))


@by_case
def test_gradgradcheck(case: Case, options: Options) -> None:
    input, target, kwargs = made(case)
    assert gradgradcheck(lambda x: softce.cross_entropy(x, target, options=options, **kwargs), (input,))


@pytest.mark.parametrize("case", GRAD_CASES[::4], ids=lambda c: c.name)
def test_forward_mode_gradcheck(case: Case) -> None:
    """jvp, jvp of the gradient, and both batched by vmap."""
    input, target, kwargs = made(case)

    def loss(x: Tensor) -> Tensor:
        return softce.cross_entropy(x, target, **kwargs)

    assert gradcheck(loss, (input,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(loss, (input,), check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)


@by_reduction
@pytest.mark.parametrize(
    "extra", [{}, {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 6.0}], ids=["plain", "extras"]
)
def test_gradients_of_everything_that_floats(reduction: str, extra: dict[str, Any], options: Options) -> None:
    """Logits, probabilities, class weights and row weights together."""
    inputs = [x.clone().requires_grad_() for x in (X, T, W + 0.1, torch.rand(4, dtype=D))]

    def loss(x: Tensor, t: Tensor, w: Tensor, r: Tensor) -> Tensor:
        return softce.cross_entropy(x, t, w, reduction=reduction, row_weight=r, options=options, **extra)

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)
    for i in range(1, 4):  # and each where the logits want none
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        assert gradcheck(loss, alone)


@pytest.mark.parametrize("form", ["topk", "topk_log", "mixup_rows", "teacher_t", "teacher_kl"])
def test_gradients_of_target_forms(form: str, options: Options) -> None:
    """The floating tensors inside a target form have gradients too."""
    input, target, _ = made(Case((2, 4), form))
    name = next(k for k, v in vars(target).items() if isinstance(v, Tensor) and v.is_floating_point())
    value = getattr(target, name).to(D).clamp(-5, 0.95).requires_grad_()

    def loss(x: Tensor, value: Tensor) -> Tensor:
        form = type(target)(**{**vars(target), name: value})
        return softce.cross_entropy(x, form, label_smoothing=0.1, options=options)

    assert gradcheck(loss, (input, value))
    assert gradgradcheck(loss, (input, value), fast_mode=True)


def test_target_gradient_is_torchs(options: Options) -> None:
    ours, theirs = ([v.clone().requires_grad_() for v in (X, T)] for _ in range(2))
    softce.cross_entropy(*ours, W, label_smoothing=0.1, options=options).backward()
    F.cross_entropy(*theirs, W, label_smoothing=0.1).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


# ---- more than one backward ----


@TARGET_FORMS
@by_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stats", [False, True])
def test_backward_twice_with_retain_graph(
    target: Tensor, reduction: str, dtype: torch.dtype, stats: bool, options: Options
) -> None:
    """The second and third gradient are the first, to the bit, and accumulate as torch's do."""
    x = X.to(dtype).requires_grad_()
    target = target.to(dtype) if target is T else target
    made = softce.cross_entropy(x, target, reduction=reduction, return_stats=stats, options=options)
    loss = made[0] if isinstance(made, tuple) else made
    upstream = torch.linspace(0.5, 2, 4).to(dtype) if reduction == "none" else torch.ones((), dtype=dtype)
    grads = [torch.autograd.grad(loss, x, upstream, retain_graph=True)[0] for _ in range(3)]
    kept = grads[0].clone()
    assert same(grads[0], grads[1]) and same(grads[0], grads[2])
    loss.backward(upstream, retain_graph=True)
    loss.backward(upstream)
    assert same(grads[0], kept)
    torch.testing.assert_close(x.grad, kept + kept)
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|freed"):
        loss.backward(upstream)


def test_a_gradient_that_was_handed_out_is_not_touched_again(options: Options) -> None:
    """Scaling a handed-out buffer in place would change what the caller holds."""
    x = X.clone().requires_grad_()
    loss = softce.cross_entropy(x, Y, options=options)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=D), retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 3 * kept)
    first.zero_()
    (third,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(third, kept)


@TARGET_FORMS
def test_results_for_each_row_may_be_changed_in_place(target: Tensor, options: Options) -> None:
    """A mask over ``reduction="none"`` is written so; statistics and the argument of a row loss of one's own too."""
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=D)
    x, z = (X.clone().requires_grad_() for _ in range(2))
    loss, stats = softce.cross_entropy(x, target, reduction="none", return_stats=True, options=options)
    loss.mul_(mask)
    loss[3] = 0.0
    stats.lse.mul_(mask).square_()
    stats.entropy[0] = 0.0
    softce.cross_entropy(x, target, row_loss=lambda rows: rows.mul_(mask), options=options).backward()
    (loss.sum() + stats.lse.sum() + stats.entropy.sum()).backward()
    want = F.cross_entropy(z, target, reduction="none") * mask
    entropy = -(F.softmax(z, 1) * F.log_softmax(z, 1)).sum(1)
    counted = torch.ones(4, dtype=D) if target is T else (target != -100).double()
    lse = counted * torch.logsumexp(z, 1) * mask
    total = want[:3].sum() + lse.square().sum() + (counted * entropy)[1:].sum() + want.sum() / counted.sum()
    total.backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_logits_may_be_changed_after_a_mean(cpu_kernels: None) -> None:
    """As with torch, whose log_softmax keeps its result: the gradient is there already."""
    leaf = X.clone().requires_grad_()
    for factor in (1.0, 3.0):
        x = leaf * 1
        loss = softce.cross_entropy(x, Y)
        (want,) = torch.autograd.grad(factor * F.cross_entropy(leaf, Y), leaf)
        with torch.no_grad():
            x.zero_()
        torch.testing.assert_close(torch.autograd.grad(factor * loss, leaf)[0], want)


def test_two_losses_of_the_same_logits(options: Options) -> None:
    x = X.clone().requires_grad_()
    (softce.cross_entropy(x, Y, options=options) + 2 * softce.cross_entropy(x, T, options=options)).backward()
    z = X.clone().requires_grad_()
    (F.cross_entropy(z, Y) + 2 * F.cross_entropy(z, T)).backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_gradient_accumulation(options: Options) -> None:
    """Over several calls into one leaf, also when the first gradient became ``.grad`` without a copy."""
    linear = torch.nn.Linear(6, 5, dtype=D)
    other = torch.nn.Linear(6, 5, dtype=D)
    other.load_state_dict(linear.state_dict())
    for _ in range(3):
        h = torch.randn(4, 6, dtype=D)
        (softce.cross_entropy(linear(h), Y, options=options) / 3).backward()
        (F.cross_entropy(other(h), Y) / 3).backward()
    torch.testing.assert_close(linear.weight.grad, other.weight.grad)
    x = X.clone().requires_grad_()
    for _ in range(3):
        softce.cross_entropy(x, Y, options=options).backward()
    (single,) = torch.autograd.grad(F.cross_entropy(x, Y), x)
    torch.testing.assert_close(x.grad, 3 * single)


# ---- create_graph ----


@TARGET_FORMS
@by_reduction
def test_create_graph(target: Tensor, reduction: str, options: Options) -> None:
    """A gradient penalty: the gradient of the gradient's norm."""

    def penalty(function: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        loss = function(x, target, W, reduction=reduction, label_smoothing=0.1, **kwargs).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + grad.pow(2).sum()

    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    mine, other = penalty(softce.cross_entropy, ours, options=options), penalty(F.cross_entropy, theirs)
    torch.testing.assert_close(mine, other)
    mine.backward()
    other.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_create_graph_through_a_network(options: Options) -> None:
    """Second derivatives for what stands before the logits, in the upstream factor, and in the third order."""
    h, v = torch.randn(4, 3, dtype=D), torch.randn(3, 5, dtype=D, requires_grad=True)
    scale = torch.tensor(1.3, dtype=D, requires_grad=True)
    results = []
    for function, kwargs in ((softce.cross_entropy, {"options": options}), (F.cross_entropy, {})):
        loss = scale * function(h @ v, Y, label_smoothing=0.1, **kwargs)
        first = torch.autograd.grad(loss, v, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), (v, scale), create_graph=True)
        third = torch.autograd.grad(second[0].sum() + second[1], v)
        results.append((first, *second, *third))
    torch.testing.assert_close(results[0], results[1])


def test_backward_with_create_graph_and_hessian(options: Options) -> None:
    hessian = torch.autograd.functional.hessian(lambda x: softce.cross_entropy(x, T, options=options), X)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: F.cross_entropy(x, T), X))


# ---- upstream factors ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.5, 1.0 / 3, 7.3, 2.0**10, -1.1, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_upstream_factor_rounds_once(factor: float, reduction: str, dtype: torch.dtype, options: Options) -> None:
    """In half precision the factor reaches the gradient before it is rounded, not after."""
    x = (3 * torch.randn(64, 40)).to(dtype).requires_grad_()
    y = torch.randint(40, (64,))
    loss = softce.cross_entropy(x, y, reduction=reduction, options=options, loss_dtype=torch.float32)
    loss.backward(torch.tensor(factor))
    want = evaluate(x.detach(), y, reduction=reduction, upstream=factor)
    assert_rounded_once(x.grad, want.grad, scale=want.grad_scale)


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, float("inf"), float("nan")])
def test_upstream_factors(factor: float, options: Options) -> None:
    upstream = torch.tensor(factor, dtype=D)
    _, want = run(F.cross_entropy, X, Y, upstream=upstream)
    _, got = run(softce.cross_entropy, X, Y, upstream=upstream, options=options)
    if factor == factor and abs(factor) != float("inf"):
        torch.testing.assert_close(got, want)
    else:  # a loss scaler must see it; whether as inf or as nan, and in ignored rows, is rounding's choice
        assert torch.equal(got[Y != -100].isfinite(), want[Y != -100].isfinite())


def test_grad_scaler_step(options: Options) -> None:
    """Gradient scaling of a half-precision loss, as torch.amp does it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    w = torch.randn(8, 5, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    h, before = torch.randn(4, 8), w.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss = softce.cross_entropy(h @ w, Y, options=options)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    z = before.clone().requires_grad_()
    F.cross_entropy((h.bfloat16() @ z.bfloat16()).float(), Y).backward()
    torch.testing.assert_close(w.grad, z.grad, rtol=2e-2, atol=2e-3)


# ---- forward mode and torch.func ----


@TARGET_FORMS
@by_reduction
def test_forward_mode(target: Tensor, reduction: str) -> None:
    tangent = torch.randn_like(X)
    results = []
    for function in (F.cross_entropy, softce.cross_entropy):
        with forward_ad.dual_level():
            out = function(forward_ad.make_dual(X, tangent), target, W, reduction=reduction, label_smoothing=0.1)
            results.append(forward_ad.unpack_dual(out))
    torch.testing.assert_close(results[1].primal, results[0].primal)
    torch.testing.assert_close(results[1].tangent, results[0].tangent)


def test_forward_mode_of_probabilities_and_forward_over_reverse() -> None:
    tangents = (torch.randn_like(X), torch.randn_like(T))
    want = torch.func.jvp(F.cross_entropy, (X, T), tangents)
    torch.testing.assert_close(torch.func.jvp(softce.cross_entropy, (X, T), tangents), want)
    for target in (Y, T):
        want = torch.func.jvp(torch.func.grad(lambda x: F.cross_entropy(x, target)), (X,), tangents[:1])  # noqa: B023
        got = torch.func.jvp(torch.func.grad(lambda x: softce.cross_entropy(x, target)), (X,), tangents[:1])  # noqa: B023
        torch.testing.assert_close(got, want)


@TARGET_FORMS
@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.1}, {"weight": W}, {"reduction": "sum"}], ids=str)
def test_func_grad_and_vmap(target: Tensor, kwargs: dict[str, Any]) -> None:
    """Per-sample gradients, jacobians, hessians and vjps."""

    def ours(x: Tensor, t: Tensor) -> Tensor:
        return softce.cross_entropy(x, t, **kwargs)

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t, **kwargs)

    full = torch.tensor([0, 1, 4, 2]) if target is Y else target
    for transform in (
        torch.func.grad,
        torch.func.grad_and_value,
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: torch.func.vmap(f),
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None)),
        lambda f: torch.func.vmap(torch.func.vmap(torch.func.grad(f))),
        lambda f: lambda x, t: torch.func.vjp(lambda x: f(x, t), x)[1](torch.tensor(1.5, dtype=D))[0],
    ):
        args: tuple[Tensor, Tensor] = (X, full)
        try:
            want = transform(theirs)(*args)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue  # torch raises for this pairing of shapes
        torch.testing.assert_close(transform(ours)(*args), want, equal_nan=True)


@pytest.mark.parametrize("kwargs", [{"label_smoothing": 0.1}, {"label_smoothing": 0.1, "weight": W}, {}], ids=str)
def test_vmap_over_targets_alone(kwargs: dict[str, Any]) -> None:
    """Torch raises for some of these; here each is right."""
    targets = torch.randint(5, (3, 4))
    got = torch.func.vmap(lambda t: softce.cross_entropy(X, t, **kwargs))(targets)
    want = torch.stack([F.cross_entropy(X, t, **kwargs) for t in targets])
    torch.testing.assert_close(got, want)
    dense = torch.rand(3, 4, 5, dtype=D)
    got = torch.func.vmap(lambda t: softce.cross_entropy(X, t, **kwargs))(dense)
    torch.testing.assert_close(got, torch.stack([F.cross_entropy(X, t, **kwargs) for t in dense]))


@by_reduction
def test_vmap_over_backward(reduction: str, options: Options) -> None:
    """``vmap(autograd.grad)`` of a graph made outside: rows of a Jacobian at once; with ``create_graph`` too."""
    for target in (Y, T):
        x = X.clone().requires_grad_()
        results = []
        for function, kwargs in ((softce.cross_entropy, {"options": options}), (F.cross_entropy, {})):
            loss = function(x, target, reduction=reduction, label_smoothing=0.1, **kwargs)
            upstream = torch.stack((torch.ones_like(loss), torch.linspace(-1, 2, loss.numel(), dtype=D).view_as(loss)))
            results.append(
                [
                    torch.func.vmap(lambda g: torch.autograd.grad(loss, x, g, **graph)[0])(upstream)  # noqa: B023
                    for graph in ({"retain_graph": True}, {"create_graph": True})
                ]
            )
        torch.testing.assert_close(*results)


def test_per_sample_gradients_of_a_model() -> None:
    """functional_call under vmap(grad), with ignored samples."""
    model = torch.nn.Linear(6, 5, dtype=D)
    h = torch.randn(4, 6, dtype=D)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: Any, h: Tensor, y: Tensor, function: Any) -> Tensor:
        return function(torch.func.functional_call(model, p, (h,)), y, reduction="sum")

    got, want = (
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, None))(parameters, h, Y, function)
        for function in (softce.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(got, want)
