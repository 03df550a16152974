# SPDX-License-Identifier: BSD-3-Clause
"""Everything that autograd, ``torch.func`` and tensor subclasses do with torch's function works with softce's."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ROW_LOSSES, TARGETS, Case
from checks import assert_rounded_once, kernel_calls, run, same
from oracle import evaluate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import softce
from softce import Options

D = torch.float64
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=D)
Y = torch.tensor([0, -100, 4, 2])
T = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=D)
W = torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0], dtype=D)

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
by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
TARGET_FORMS = pytest.mark.parametrize("target", [Y, T], ids=["indices", "probabilities"])


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
def test_backward_twice_with_retain_graph(target: Tensor, reduction: str, dtype: torch.dtype, options: Options) -> None:
    """The second and third gradient are the first, to the bit, and accumulate as torch's do."""
    x = X.to(dtype).requires_grad_()
    loss = softce.cross_entropy(x, target.to(dtype) if target is T else target, reduction=reduction, options=options)
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


# ---- the gradient in place of the logits ----

INPLACE = Options(inplace=True)


@TARGET_FORMS
@by_reduction
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16, torch.float16])
def test_inplace_gradient(cpu_kernels: None, target: Tensor, reduction: str, dtype: torch.dtype) -> None:
    """Equal to the ordinary gradient, in the logits' own memory."""
    t = target.to(dtype) if target is T else target
    h, v = torch.randn(4, 3).to(dtype), torch.randn(3, 5).to(dtype)
    upstream = torch.linspace(1, 2, 4).to(dtype) if reduction == "none" else None
    results = []
    for options in (Options(backend="cpu"), Options(backend="cpu", inplace=True)):
        w = v.clone().requires_grad_()
        logits = h @ w
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        before, version = logits.detach().clone(), logits._version
        loss = softce.cross_entropy(logits, t, reduction=reduction, label_smoothing=0.1, options=options)
        loss.backward(upstream)
        results.append((loss.detach(), seen[0].clone(), w.grad))
        if options.inplace:
            assert logits._version > version
            assert seen[0].data_ptr() == logits.data_ptr()
            assert not torch.equal(logits.detach(), before)
        else:
            assert torch.equal(logits.detach(), before) and logits._version == version
    torch.testing.assert_close(results[1], results[0])


def test_inplace_allocates_nothing_large(cpu_kernels: None) -> None:
    x = torch.randn(256, 4096, requires_grad=True)
    y = torch.randint(4096, (256,))
    for options, limit in ((Options(inplace=True), 2**20), (Options(), 2**23)):
        logits = x * 1.0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss = softce.cross_entropy(logits, y, options=options)
        used = sum(max(0, e.self_cpu_memory_usage) for e in profile.events() if e.name.startswith("aten::"))
        assert used < limit
        assert loss.isfinite()


def test_inplace_of_a_leaf(cpu_kernels: None) -> None:
    """A leaf's values may be overwritten only where torch itself lets a leaf be written to: else it raises."""
    x = X.clone().requires_grad_()
    before = x.detach().clone()
    _, want = run(F.cross_entropy, X, Y)
    try:
        softce.cross_entropy(x, Y, options=INPLACE).backward()
    except RuntimeError as error:
        assert "leaf" in str(error) or "inplace" in str(error)
        assert torch.equal(x.detach(), before)
    else:
        torch.testing.assert_close(x.grad, want)


def logits_of(w: Tensor) -> Tensor:
    return torch.ones(4, 3, dtype=D) @ w


@by_reduction
def test_inplace_misuse_raises(cpu_kernels: None, reduction: str) -> None:
    """Whatever would read the lost logits, or a gradient that is spent: never wrong in silence."""
    w = torch.randn(3, 5, dtype=D, requires_grad=True)

    def fresh() -> tuple[Tensor, Tensor]:
        logits = logits_of(w)
        return logits, softce.cross_entropy(logits, Y, reduction=reduction, options=INPLACE).sum()

    # a second backward
    logits, loss = fresh()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()
    # create_graph: right, where the logits are still there at backward, or raises
    logits, loss = fresh()
    want = F.cross_entropy(logits_of(w), Y, reduction=reduction).sum()
    (want,) = torch.autograd.grad(torch.autograd.grad(want, w, create_graph=True)[0].pow(2).sum(), w)
    try:
        (grad,) = torch.autograd.grad(loss, w, create_graph=True)
        (got,) = torch.autograd.grad(grad.pow(2).sum(), w)
    except RuntimeError as error:
        assert "inplace=True" in str(error) and reduction != "none"
    else:
        torch.testing.assert_close(got, want)
    # a use before the loss whose backward needs the logits
    logits = logits_of(w)
    squared = logits.pow(2).sum()
    loss = softce.cross_entropy(logits, Y, reduction=reduction, options=INPLACE).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
        squared.backward()
    # a use after the loss
    logits, loss = fresh()
    if reduction != "none":
        later = logits.exp().sum()
        with pytest.raises(RuntimeError):
            (loss + later).backward()
    # a second loss of the same logits
    logits, loss = fresh()
    with pytest.raises(RuntimeError):
        (loss + softce.cross_entropy(logits, Y, reduction=reduction, options=INPLACE).sum()).backward()


def test_inplace_use_before_the_loss_that_needs_no_logits(cpu_kernels: None) -> None:
    """A sum before the loss saved nothing: both gradients arrive."""
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    logits = logits_of(w)
    total = logits.sum()
    (softce.cross_entropy(logits, Y, options=INPLACE) + total).backward()
    z = w.detach().clone().requires_grad_()
    (F.cross_entropy(logits_of(z), Y) + logits_of(z).sum()).backward()
    torch.testing.assert_close(w.grad, z.grad)


def test_inplace_with_statistics_and_their_gradients(cpu_kernels: None) -> None:
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    loss, stats = softce.cross_entropy(logits_of(w), Y, options=INPLACE, return_stats=True)
    want, want_stats = softce.cross_entropy(logits_of(w), Y, return_stats=True)
    torch.testing.assert_close((loss, *stats), (want, *want_stats))
    (expected,) = torch.autograd.grad(want + want_stats.entropy.sum(), w)
    try:
        (got,) = torch.autograd.grad(loss + stats.entropy.sum(), w)
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        torch.testing.assert_close(got, expected)


def test_inplace_views_and_targets_that_want_gradients(cpu_kernels: None) -> None:
    """Expanded logits share memory between elements, and a target's gradient needs the logits: right or raise."""
    base = torch.randn(1, 5, dtype=D, requires_grad=True)
    want = torch.autograd.grad(F.cross_entropy(base.expand(4, 5), Y), base)[0]
    try:
        got = torch.autograd.grad(softce.cross_entropy(base.expand(4, 5), Y, options=INPLACE), base)[0]
    except RuntimeError:
        pass
    else:
        torch.testing.assert_close(got, want)
    logits, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    want_grads = torch.autograd.grad(F.cross_entropy(logits * 1, t), (logits, t))
    for reduction in ("mean", "none"):
        try:
            got_grads = torch.autograd.grad(
                softce.cross_entropy(logits * 1, t, reduction=reduction, options=INPLACE).sum(), (logits, t)
            )
        except RuntimeError:
            continue
        if reduction == "mean":
            torch.testing.assert_close(got_grads, want_grads)


@pytest.mark.parametrize("view", ["slice", "transposed", "channels_last"])
def test_inplace_of_strided_logits(cpu_kernels: None, view: str) -> None:
    """Only the logits' own elements are written."""
    w = torch.randn(3, 12, dtype=D, requires_grad=True)
    wide = torch.ones(4, 3, dtype=D) @ w
    if view == "slice":
        take: Callable[[Tensor], Tensor] = lambda b: b[:, 2:7]  # noqa: E731
        y = Y
    elif view == "transposed":
        take = lambda b: b.t()[:, :4]  # noqa: E731
        y = torch.randint(4, (12,))
    else:
        take = lambda b: b.reshape(1, 4, 6, 2).movedim(-1, 1)  # noqa: E731
        y = torch.randint(2, (1, 4, 6))
    (want,) = torch.autograd.grad(F.cross_entropy(take(wide), y), w, retain_graph=True)
    before = wide.detach().clone()
    logits = take(wide)
    outside = torch.ones_like(before, dtype=torch.bool)
    take(outside).fill_(False)
    try:
        (got,) = torch.autograd.grad(softce.cross_entropy(logits, y, options=INPLACE), w)
    except RuntimeError as error:
        assert "inplace" in str(error) or "view" in str(error)
    else:
        torch.testing.assert_close(got, want)
    assert torch.equal(wide.detach()[outside], before[outside])


def test_inplace_without_gradients_leaves_the_logits(options: Options) -> None:
    inplace = Options(backend=options.backend, inplace=True)
    for x in (X.clone(), X.clone().requires_grad_()):
        with torch.no_grad():
            softce.cross_entropy(x, Y, options=inplace)
        assert torch.equal(x.detach(), X)


# ---- version counters and hooks ----


@by_reduction
def test_modified_logits_are_noticed(reduction: str, options: Options) -> None:
    """An in-place change after the loss must not go into the gradient unseen."""
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    (want,) = torch.autograd.grad(F.cross_entropy(logits_of(w), Y, reduction=reduction).sum(), w)
    logits = logits_of(w)
    loss = softce.cross_entropy(logits, Y, reduction=reduction, options=options).sum()
    with torch.no_grad():
        logits.mul_(2)
    try:
        (got,) = torch.autograd.grad(loss, w)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)


@by_reduction
def test_modified_targets_are_noticed(reduction: str, options: Options) -> None:
    for target, change in ((torch.tensor([0, 1, 2, 3]), lambda t: t.fill_(4)), (T.clone(), lambda t: t.zero_())):
        x = X.clone().requires_grad_()
        (want,) = torch.autograd.grad(F.cross_entropy(x, target.clone(), reduction=reduction).sum(), x)
        loss = softce.cross_entropy(x, target, reduction=reduction, options=options).sum()
        change(target)
        try:
            (got,) = torch.autograd.grad(loss, x)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(got, want)


def test_hooks_see_the_gradient(options: Options) -> None:
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    logits = logits_of(w)
    logits.retain_grad()
    seen: list[Tensor] = []
    logits.register_hook(lambda g: seen.append(g.clone()))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    softce.cross_entropy(logits, Y, options=options).backward()
    _, want = run(F.cross_entropy, logits.detach(), Y)
    torch.testing.assert_close(seen[0], want)
    torch.testing.assert_close(logits.grad, want)
    assert len(seen) == 2
    # a hook that replaces the gradient
    logits = logits_of(w)
    logits.register_hook(lambda g: g * 10)
    (got,) = torch.autograd.grad(softce.cross_entropy(logits, Y, options=options), w)
    torch.testing.assert_close(got, 10 * torch.ones(3, 4, dtype=D) @ want)


def test_saved_tensor_hooks_and_checkpoint(options: Options) -> None:
    w = torch.randn(3, 5, dtype=D, requires_grad=True)
    (want,) = torch.autograd.grad(F.cross_entropy(logits_of(w), Y), w)
    for reduction in ("mean", "none"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            loss = softce.cross_entropy(logits_of(w), Y, reduction=reduction, options=options).sum()
        (got,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(got, want if reduction == "mean" else 3 * want)
    loss = torch.utils.checkpoint.checkpoint(
        lambda w: softce.cross_entropy(logits_of(w), Y, options=options), w, use_reentrant=False
    )
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], want)


# ---- grad modes ----


def test_grad_modes(options: Options) -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not softce.cross_entropy(x, Y, options=options).requires_grad
    with torch.inference_mode():
        inside = softce.cross_entropy(x, Y, options=options)
        from_inside = softce.cross_entropy(X.clone(), Y, options=options)
    assert inside.is_inference()
    torch.testing.assert_close(inside, from_inside)
    assert not softce.cross_entropy(X, Y, options=options).requires_grad
    assert not softce.cross_entropy(x.detach(), Y, options=options).requires_grad
    with torch.no_grad(), torch.enable_grad():
        assert softce.cross_entropy(x, Y, options=options).requires_grad
    with torch.autograd.set_detect_anomaly(True, check_nan=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        softce.cross_entropy(x, Y, options=options).backward()


# ---- autocast ----


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [D, torch.float32, torch.bfloat16, torch.float16])
@TARGET_FORMS
def test_autocast(autocast_dtype: torch.dtype, input_dtype: torch.dtype, target: Tensor, options: Options) -> None:
    """The loss of half-precision logits is float32, as under torch's autocast; the gradient has the logits' dtype."""
    x = X.to(input_dtype)
    t = target.to(input_dtype) if target is T else target
    with torch.autocast("cpu", autocast_dtype):
        want, _ = run(F.cross_entropy, x, t)
        got, grad = run(softce.cross_entropy, x, t, options=options)
        none = softce.cross_entropy(x, t, reduction="none", options=options)
        explicit = softce.cross_entropy(x, t, loss_dtype=torch.bfloat16, options=options)
    assert got.dtype == want.dtype == none.dtype
    assert explicit.dtype == torch.bfloat16
    exact = evaluate(x, t)
    assert_rounded_once(got, exact.loss, logits_dtype=input_dtype)
    assert_rounded_once(grad, exact.grad)
    with torch.autocast("cpu", autocast_dtype):
        # Weights in the logits' dtype, and float32 ones as a module holds them.
        for w in {input_dtype, torch.float32 if input_dtype != D else D}:
            got = softce.cross_entropy(x, t, W.to(w), options=options)
            assert_rounded_once(got, evaluate(x, t, W.to(w)).loss, logits_dtype=input_dtype)


def test_training_under_autocast(options: Options) -> None:
    model = torch.nn.Linear(6, 5)
    h = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(h)
        assert logits.dtype == torch.bfloat16
        loss = softce.cross_entropy(logits, Y, options=options)
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32


# ---- meta and fake tensors ----


@TARGET_FORMS
@by_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors(target: Tensor, reduction: str, dtype: torch.dtype) -> None:
    x = X.to(dtype).to("meta").requires_grad_()
    t = (target.to(dtype) if target is T else target).to("meta")
    loss = softce.cross_entropy(x, t, reduction=reduction, label_smoothing=0.1)
    want = F.cross_entropy(x, t, reduction=reduction, label_smoothing=0.1)
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", want.shape, want.dtype)
    loss.sum().backward()
    assert x.grad.shape == x.shape and x.grad.dtype == dtype and x.grad.device.type == "meta"
    loss, stats = softce.cross_entropy(x, t, reduction=reduction, return_stats=True)
    assert stats.lse.shape == (4,) and stats.correct.dtype == torch.bool


@TARGET_FORMS
@by_reduction
def test_fake_tensors(target: Tensor, reduction: str) -> None:
    for shape, rows in (((4, 5), (4,)), ((2, 5, 3), (2, 3)), ((5,), ())):
        with FakeTensorMode():
            x = torch.empty(shape, requires_grad=True)
            t = torch.empty(shape) if target is T else torch.empty(rows, dtype=torch.int64)
            loss = softce.cross_entropy(x, t, reduction=reduction, weight=torch.empty(5))
            assert isinstance(loss, FakeTensor)
            assert loss.shape == (rows if reduction == "none" else ())
            loss.sum().backward()
            assert x.grad.shape == shape


def test_make_fx_traces() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = softce.cross_entropy(x, y, label_smoothing=0.1)
        return torch.autograd.grad(loss, x)[0]

    for mode in ("real", "fake", "symbolic"):
        for dtype in (D, torch.float32):
            x = X.to(dtype).requires_grad_()
            graph = make_fx(step, tracing_mode=mode)(x, Y)
            torch.testing.assert_close(graph(x, Y), step(x, Y))


# ---- where the computation runs ----


def test_what_no_kernel_can_do_goes_to_the_formula(cpu_kernels: None) -> None:
    """And nothing else does."""
    x = X.clone().requires_grad_()
    with kernel_calls() as calls:
        torch.autograd.grad(softce.cross_entropy(x, Y), x)
        torch.autograd.grad(softce.cross_entropy(x, Y, reduction="none").sum(), x)
    assert calls == {"row_fused": 1, "row_stats": 1, "row_grad": 1}
    with kernel_calls() as calls:
        torch.func.grad(lambda x: softce.cross_entropy(x, Y))(X)
    assert not calls
    with kernel_calls() as calls:
        loss = softce.cross_entropy(x, Y)
        torch.autograd.grad(loss, x, retain_graph=True)
        torch.autograd.grad(loss, x)
    assert calls["row_fused"] + calls["row_grad"] == 2


def test_threads_of_backward(options: Options) -> None:
    """Losses of several graphs at once, from several Python threads."""
    import threading

    want = run(F.cross_entropy, X, Y)
    failures: list[Any] = []

    def work() -> None:
        for _ in range(20):
            got = run(softce.cross_entropy, X, Y, options=options)
            if not all(torch.allclose(a, b) for a, b in zip(got, want, strict=True)):
                failures.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_deepcopy_and_pickle_of_a_module() -> None:
    import copy
    import io
    import pickle

    module = softce.CrossEntropyLoss(torch.rand(5, dtype=D), label_smoothing=0.1, row_loss=softce.Focal(2.0))
    want = module(X, Y)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X, Y), want)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    assert list(itertools.chain(module.state_dict())) == ["weight"]
