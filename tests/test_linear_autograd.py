# SPDX-License-Identifier: BSD-3-Clause
"""Autograd, transforms and training steps through the fused linear loss: right, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checks import same
from linear_cases import D, H, N, V, Y, by_chunk, chunked, leaves
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import softce
from softce import Options

linear_ce = softce.linear_cross_entropy


def small(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, dtype=D, requires_grad=True) for s in shapes)


# ---- derivatives against finite differences ----

LOSSES: dict[str, Callable[..., Any]] = {
    "mean": lambda x, w, b: linear_ce(x, w, Y[:4], linear_bias=b, label_smoothing=0.1),
    "none": lambda x, w, b: linear_ce(x, w, Y[:4], linear_bias=b, reduction="none", z_loss=0.01, softcap=5.0),
    "own": lambda x, w, b: linear_ce(x, w, Y[:4], linear_bias=b, row_loss=lambda loss: (loss - loss.mean()) ** 2),
    "logprobs": lambda x, w, b: tuple(softce.linear_logprobs(x, w, Y[:4], 1.3, b)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradcheck(loss: Callable[..., Any], cpu_kernels: None) -> None:
    inputs = small((4, 3), (5, 3), (5,))
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)
    assert gradcheck(loss, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("chunk", [None, (2, 2)], ids=["chosen", "tiles"])
def test_gradients_of_targets_and_weights(chunk: tuple[int, int] | None, cpu_kernels: None) -> None:
    """Only those asked for, whatever the target form; by chunks of rows."""
    x, w = small((4, 3), (5, 3))
    prob = torch.rand(4, 5, dtype=D).requires_grad_()
    weight, row_weight = torch.rand(5, dtype=D).requires_grad_(), torch.rand(4, dtype=D).requires_grad_()
    hidden, teacher, bias = small((4, 2), (5, 2), (5,))
    value = torch.rand(4, 2, dtype=D).softmax(1).mul(0.9).detach().requires_grad_()
    index = torch.tensor([[0, 1], [2, -1], [-1, -1], [4, 3]])
    checks: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x, w, p, c: linear_ce(x, w, p, weight=c, label_smoothing=0.1), (x, w, prob, weight)),
        (lambda w, p: linear_ce(x.detach(), w, p.reshape(2, 2, 5).reshape(4, 5)), (w, prob)),
        (lambda x, r: linear_ce(x, w.detach(), Y[:4], row_weight=r), (x, row_weight)),
        (lambda x, v: linear_ce(x, w.detach(), softce.TopK(index, v, "uniform")), (x, value)),
        (lambda x, t: linear_ce(x, w.detach(), softce.Teacher(t, 2.0, divergence=True)), (x, prob)),
        (lambda x, h, t, b: linear_ce(x, w.detach(), softce.LinearTeacher(h, t, b, 2.0)), (x, hidden, teacher, bias)),
        (lambda h, t: linear_ce(x, w.detach(), softce.LinearTeacher(h, t, divergence=True)), (hidden, teacher)),
    ]
    with chunked(chunk):
        for function, inputs in checks:
            assert gradcheck(function, inputs)


@by_chunk
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_beside_smoothing_and_weights_need_no_formula(
    reduction: str, kernel: bool, chunk: tuple[int, int] | None, cpu_kernels: None
) -> None:
    x, w, b = leaves(D)
    kwargs: dict[str, Any] = {
        "weight": torch.rand(V, dtype=D),
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "temperature": 2.0,
    }
    kwargs.update(linear_bias=b, reduction=reduction, return_stats=True)
    for target in (Y, torch.rand(N, V, dtype=D), softce.LinearTeacher(torch.randn(N, 4, dtype=D), w.detach()[:, :4])):
        with (
            chunked(chunk),
            mock.patch("softce.linear.call.use_kernel", lambda *_: kernel),
            mock.patch("softce.linear.loop.reference_vjp", side_effect=AssertionError("the formula")),
        ):
            loss, stats = linear_ce(x, w, target, **kwargs)
            outputs = (loss, *stats[:3])
            upstream = [torch.rand_like(out) for out in outputs]
            got = torch.autograd.grad(outputs, (x, w, b), upstream)
        loss, stats = linear_ce(x, w, target, options=Options(backend="reference"), **kwargs)
        want = torch.autograd.grad((loss, *stats[:3]), (x, w, b), upstream)
        torch.testing.assert_close(got, want)


# ---- more than one backward ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@by_chunk
def test_second_backward(chunk: tuple[int, int] | None, reduction: str, cpu_kernels: None) -> None:
    with chunked(chunk):
        x, w, b = leaves(torch.float32)
        loss = linear_ce(x, w, Y, linear_bias=b, reduction=reduction).sum()
        inputs = (x, w, b)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)  # type: ignore[arg-type]
        kept = [g.clone() for g in first]
        first[1].zero_()  # what was handed out is the caller's
        second = torch.autograd.grad(loss, inputs, retain_graph=True)  # type: ignore[arg-type]
        tripled = torch.autograd.grad(3 * loss, inputs)  # type: ignore[arg-type]
    assert all(same(a, c) for a, c in zip(kept, second, strict=True))
    for a, c in zip(kept, tripled, strict=True):
        torch.testing.assert_close(3 * a, c)


def test_freed_graph_and_changed_weight_raise(cpu_kernels: None) -> None:
    x, w, _ = leaves(torch.float32)
    loss = linear_ce(x, w, Y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = linear_ce(x, w, Y)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_create_graph(cpu_kernels: None) -> None:
    x, w, b = leaves(D)
    found = []
    for loss in (linear_ce(x, w, Y, linear_bias=b), F.cross_entropy(F.linear(x, w, b), Y)):
        gradient = torch.autograd.grad(loss, (x, w), create_graph=True)
        penalty = gradient[0].square().sum() + gradient[1].square().sum()
        found.append(torch.autograd.grad(penalty, (x, w, b)))  # type: ignore[arg-type]
    for a, c in zip(*found, strict=True):
        torch.testing.assert_close(a, c)


def test_func_transforms() -> None:
    x, w, _ = (None if t is None else t.detach() for t in leaves(D))
    assert x is not None and w is not None

    def ours(x: Tensor, target: Tensor = Y) -> Tensor:
        loss: Tensor = linear_ce(x, w, target)  # type: ignore[arg-type,assignment]
        return loss

    def torchs(x: Tensor, target: Tensor = Y) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(torchs)(x))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(torchs, (x,), (x,)))
    each = (x, Y.clamp(min=0))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(ours))(*each), torch.func.vmap(torch.func.grad(torchs))(*each)
    )
    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(ours, x), hessian(torchs, x))


def test_batched_gradients(cpu_kernels: None) -> None:
    x, w, _ = leaves(D)
    found = []
    for loss in (linear_ce(x, w, Y, reduction="none"), F.cross_entropy(F.linear(x, w), Y, reduction="none")):
        found.append(torch.autograd.grad(loss, x, torch.eye(N, dtype=D), is_grads_batched=True)[0])
    torch.testing.assert_close(*found)
    loss = linear_ce(x, w, Y)
    (both,) = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0], dtype=D), is_grads_batched=True)
    torch.testing.assert_close(both[1], 2 * both[0])


def test_named_backend_does_not_fall_back(cpu_kernels: None) -> None:
    x, w, _ = leaves(D)
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.func.grad(lambda x: linear_ce(x, w, Y, options=Options(backend="cpu")))(x.detach())
    with pytest.warns(UserWarning, match="plain PyTorch formula"):
        torch.func.grad(lambda x: linear_ce(x, w, Y, options=Options(explain=True)))(x.detach())


# ---- only the gradients that are needed ----


@pytest.mark.parametrize(("frozen", "products"), [("", 3), ("w", 2), ("x", 2), ("xw", 1)])
def test_frozen_tensors_save_their_product(frozen: str, products: int, cpu_kernels: None) -> None:
    x, w, _ = leaves(torch.float32)
    x.requires_grad_("x" not in frozen)
    w.requires_grad_("w" not in frozen)
    count = mock.Mock(side_effect=torch.mm)
    with mock.patch("torch.mm", count), chunked((N, V)):
        loss = linear_ce(x, w, Y)
        if frozen != "xw":
            loss.backward()
    assert count.call_count == products
    assert (x.grad is None) == ("x" in frozen) and (w.grad is None) == ("w" in frozen)


def test_no_grad_computes_the_loss_alone(cpu_kernels: None) -> None:
    x, w, _ = leaves(torch.float32)
    count = mock.Mock(side_effect=torch.mm)
    with torch.no_grad(), mock.patch("torch.mm", count), chunked((N, V)):
        loss = linear_ce(x, w, Y)
    assert count.call_count == 1 and not loss.requires_grad  # type: ignore[union-attr]


# ---- training ----


def test_autocast(cpu_kernels: None) -> None:
    x, w, b = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_ce(x, w, Y, linear_bias=b)
    assert loss.dtype == torch.float32  # type: ignore[union-attr]
    low = [None if t is None else t.detach().bfloat16().requires_grad_() for t in (x, w, b)]
    want = linear_ce(low[0], low[1], Y, linear_bias=low[2], loss_dtype=torch.float32)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, want)
    loss.backward()  # type: ignore[union-attr]
    want.backward()  # type: ignore[union-attr]
    for leaf, half in zip((x, w, b), low, strict=True):
        assert leaf is not None and half is not None and leaf.grad is not None and half.grad is not None
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, half.grad.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_scaled_half_precision_gradients_round_once(scale: float, dtype: torch.dtype, cpu_kernels: None) -> None:
    """The mean over many rows would underflow in float16 before a loss scaler multiplies it."""
    rows = 4096
    x = torch.randn(rows, H).to(dtype).requires_grad_()
    w = torch.randn(V, H).to(dtype).requires_grad_()
    target = torch.randint(V, (rows,))
    loss = linear_ce(x, w, target, loss_dtype=torch.float32)
    (loss * scale).backward()  # type: ignore[union-attr]
    xd, wd = (t.detach().double().requires_grad_() for t in (x, w))
    (F.cross_entropy(F.linear(xd, wd), target) * scale).backward()
    for got, want in ((x.grad, xd.grad), (w.grad, wd.grad)):
        assert got is not None and want is not None
        once = (want.to(dtype).double() - want).norm()
        assert (got.double() - want).norm() <= 1.05 * once + 1e-6 * want.norm()


def test_weight_gradient_accumulates_in_float32(cpu_kernels: None) -> None:
    """Many chunks of a half-precision weight: no chunk's part is rounded."""
    x = torch.randn(512, H).bfloat16().requires_grad_()
    w = torch.randn(V, H).bfloat16().requires_grad_()
    target = torch.randint(V, (512,))
    with chunked((4, V)):
        linear_ce(x, w, target).backward()  # type: ignore[union-attr]
    wd = w.detach().double().requires_grad_()
    F.cross_entropy(F.linear(x.detach().double(), wd), target).backward()
    assert wd.grad is not None and w.grad is not None
    once = (wd.grad.bfloat16().double() - wd.grad).norm()
    assert (w.grad.double() - wd.grad).norm() <= 1.05 * once


class TiedModel(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.loss = loss

    def forward(self, tokens: Tensor) -> Any:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        return self.loss(hidden, self.embedding.weight, tokens)


def plain_loss(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden[:, :-1], weight).reshape(-1, V), tokens[:, 1:].reshape(-1))


def test_training_with_tied_embeddings_accumulation_and_checkpoints(cpu_kernels: None) -> None:
    states = []
    for loss in (lambda h, w, t: linear_ce(h, w, t, shift=True), plain_loss):
        torch.manual_seed(3)
        model = TiedModel(loss).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for step in range(6):
            tokens = torch.randint(V, (4, 9))
            if step % 3 == 1:  # activation checkpointing around the loss
                value = torch.utils.checkpoint.checkpoint(model, tokens, use_reentrant=False)
            else:
                value = model(tokens)
            (value * 0.5).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step % 4 == 1)
        states.append([p.detach().clone() for p in model.parameters()])
    for a, c in zip(*states, strict=True):
        torch.testing.assert_close(a, c)


def test_weights_whose_storage_comes_and_goes(cpu_kernels: None) -> None:
    """As sharded training does it: gathered before forward, freed behind it, gathered again before backward."""
    x, w, _ = leaves(torch.float32)
    for reduction in ("mean", "none"):
        loss = linear_ce(x, w, Y, reduction=reduction).sum()  # type: ignore[union-attr]
        want = torch.autograd.grad(F.cross_entropy(F.linear(x, w), Y, reduction=reduction).sum(), (x, w))
        with torch.autograd._unsafe_preserve_version_counter(w):
            kept = w.detach().clone()
            size = w.untyped_storage().nbytes()
            w.untyped_storage().resize_(0)
            w.untyped_storage().resize_(size)
            with torch.no_grad():
                w.copy_(kept)
        for a, c in zip(torch.autograd.grad(loss, (x, w)), want, strict=True):
            torch.testing.assert_close(a, c)


def test_gradients_stay_the_callers(cpu_kernels: None) -> None:
    """A gradient kept from one step is not the memory of the next one's."""
    x, w, _ = leaves(torch.float32)
    linear_ce(x, w, Y).backward()  # type: ignore[union-attr]
    kept = w.grad
    assert kept is not None
    copy, w.grad = kept.clone(), None
    linear_ce(2 * x, w, Y).backward()  # type: ignore[union-attr]
    assert same(kept, copy)


def test_results_for_each_row_may_be_changed_in_place(cpu_kernels: None) -> None:
    x, w, _ = leaves(D)
    y, mask = Y.clamp_min(0), torch.linspace(0, 1, N, dtype=D)
    loss = linear_ce(x, w, y, reduction="none")
    logprobs = softce.linear_logprobs(x, w, y)
    total = (loss.mul_(mask) - logprobs.log_prob.mul_(mask) + logprobs.entropy.mul_(mask)).sum()
    log_p = F.log_softmax(F.linear(x, w), 1)
    want = ((2 * F.nll_loss(log_p, y, reduction="none") - (log_p.exp() * log_p).sum(1)) * mask).sum()
    for a, c in zip(torch.autograd.grad(total, (x, w)), torch.autograd.grad(want, (x, w)), strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_backward(reduction: str, cpu_kernels: None) -> None:
    """``vmap(autograd.grad)`` of a graph made outside."""
    x, w, _ = leaves(D)
    results = []
    for loss in (linear_ce(x, w, Y, reduction=reduction), F.cross_entropy(F.linear(x, w), Y, reduction=reduction)):
        assert isinstance(loss, Tensor)
        upstream = torch.stack((torch.ones_like(loss), torch.full_like(loss, -3.0)))
        results.append(
            torch.func.vmap(lambda g: torch.autograd.grad(loss, (x, w), g, retain_graph=True))(upstream)  # noqa: B023
        )
    torch.testing.assert_close(*results)
