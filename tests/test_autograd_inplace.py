# SPDX-License-Identifier: BSD-3-Clause
"""``Options(inplace=True)``: the gradient in place of the logits, and what can no longer be asked for then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from autograd_inputs import TARGET_FORMS, D, T, X, Y, assert_right_or_refused, by_reduction, logits_of
from checks import run
from torch import Tensor

import softce
from softce import Options

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
    assert_right_or_refused(lambda: torch.autograd.grad(loss + stats.entropy.sum(), w)[0], expected, "inplace")


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
    assert_right_or_refused(
        lambda: torch.autograd.grad(softce.cross_entropy(logits, y, options=INPLACE), w)[0], want, "inplace", "view"
    )
    assert torch.equal(wide.detach()[outside], before[outside])


def test_inplace_without_gradients_leaves_the_logits(options: Options) -> None:
    inplace = Options(backend=options.backend, inplace=True)
    for x in (X.clone(), X.clone().requires_grad_()):
        with torch.no_grad():
            softce.cross_entropy(x, Y, options=inplace)
        assert torch.equal(x.detach(), X)
