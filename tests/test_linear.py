# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear losses give the values and gradients of the same loss on whole logits, in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import ROW_LOSSES, TARGETS, Case
from linear_cases import D, H, N, V, by_chunk, chunked, close, leaves, truth
from oracle import evaluate

import softce
from softce import Options

CASES = [
    *(Case((N, V), target, options) for target in TARGETS for options in ("plain", "none", "everything")),
    *(Case((N, V), target, "smoothed", weight=True) for target in ("ignored", "probs", "topk_uniform", "teacher_kl")),
    *(Case((N, V), target, row_loss=row_loss) for target in ("ignored", "teacher_kl") for row_loss in ROW_LOSSES),
    *(Case((N, V), target, "smoothed_sum", row_weight=True, weight=True) for target in ("mixup", "unnormalised")),
    Case((N, V), "ignored", "others", row_weight=True, row_loss="poly1"),
    Case((N, V), "topk", "everything_none", row_weight=True, weight=True, row_loss="focal"),
]


def compare(case: Case, dtype: torch.dtype, chunk: tuple[int, int] | None, options: Options, **more: Any) -> None:
    _, target, kwargs = case.make("cpu", dtype)
    maps = leaves(dtype, bias=case.options != "plain")
    upstream: Any = 2.5
    if case.reduction == "none":
        upstream = torch.linspace(-1, 2, N)
    want, gradients = truth(maps, target, upstream, kwargs)
    x, w, b = maps
    with chunked(chunk):
        loss = softce.linear_cross_entropy(x, w, target, linear_bias=b, options=options, **kwargs, **more)
        promoted = torch.float32 if case.target == "wide_probs" and dtype != D else dtype
        assert loss.dtype == promoted
        loss.backward(torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss))
    close(loss, want.loss, promoted, "loss")
    for name, leaf, gradient in zip(("input", "weight", "bias"), maps, gradients, strict=False):
        assert leaf is not None and leaf.grad is not None and leaf.grad.dtype == dtype
        # Upstream and loss are rounded to half precision before the gradients see them.
        close(leaf.grad, gradient, dtype, name)


@by_chunk
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case: Case, chunk: tuple[int, int] | None, cpu_kernels: None) -> None:
    compare(case, D, chunk, Options(backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [(5, V), (5, 16)], ids=["rows", "tiles"])
@pytest.mark.parametrize("case", CASES[::3], ids=lambda c: c.name)
def test_dtypes(case: Case, chunk: tuple[int, int], dtype: torch.dtype, cpu_kernels: None) -> None:
    compare(case, dtype, chunk, Options(backend="cpu"))


@pytest.mark.parametrize("chunk", [(5, V), (5, 16)], ids=["rows", "tiles"])
@pytest.mark.parametrize("case", CASES[::4], ids=lambda c: c.name)
def test_chunks_without_kernels(case: Case, chunk: tuple[int, int]) -> None:
    """The chunk loop on the plain formula, which machines without a compiler take."""
    with (
        mock.patch("softce.linear.call.use_kernel", lambda *_: False),
        mock.patch.multiple("softce.ops", row_stats=None, row_grad_=None, row_fused_=None),
    ):
        compare(case, D, chunk, Options())


@pytest.mark.parametrize("case", CASES[::4], ids=lambda c: c.name)
def test_reference_backend(case: Case) -> None:
    compare(case, D, None, Options(backend="reference"))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.2}, {"row_loss": softce.Poly1(1.5)}], ids=str)
@by_chunk
def test_linear_teacher(
    chunk: tuple[int, int] | None, more: dict[str, Any], divergence: bool, scaled: bool, cpu_kernels: None
) -> None:
    hidden, weight = torch.randn(N, 3, dtype=D), torch.randn(V, 3, dtype=D)
    target = softce.LinearTeacher(hidden, weight, None, 2.0, scaled, divergence)
    maps = leaves(D)
    want, gradients = truth(maps, target, 1.0, more)
    with chunked(chunk):
        loss = softce.linear_cross_entropy(*maps[:2], target, linear_bias=maps[2], **more)  # type: ignore[arg-type]
        loss.backward()
    close(loss, want.loss, D, "loss")
    for leaf, gradient in zip(maps, gradients, strict=True):
        assert leaf is not None and leaf.grad is not None
        close(leaf.grad, gradient, D, "gradient")


def test_linear_teacher_of_half_precision_beside_a_wider_student(cpu_kernels: None) -> None:
    x, w, _ = leaves(torch.float32)
    hidden, weight = torch.randn(N, 3).bfloat16(), torch.randn(V, 3).bfloat16()
    loss = softce.linear_cross_entropy(x, w, softce.LinearTeacher(hidden, weight))
    want = evaluate(F.linear(x.detach(), w.detach()), softce.Teacher(F.linear(hidden.double(), weight.double())))
    close(loss, want.loss, torch.float32, "loss")


@by_chunk
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("target", ["ignored", "topk_uniform", "mixup_rows", "unnormalised", "teacher_t"])
def test_statistics(target: str, options: str, chunk: tuple[int, int] | None, cpu_kernels: None) -> None:
    case = Case((N, V), target, options, weight=options != "plain")
    _, form, kwargs = case.make("cpu", D)
    x, w, b = leaves(D)
    assert b is not None
    logits = F.linear(x, w, b)
    reference = Options(backend="reference")
    want, expected = softce.cross_entropy(logits, form, return_stats=True, options=reference, **kwargs)
    with chunked(chunk):
        loss, stats = softce.linear_cross_entropy(x, w, form, linear_bias=b, return_stats=True, **kwargs)
        for name in ("lse", "target_log_prob", "entropy"):
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-11, atol=1e-11)
        assert torch.equal(stats.correct, expected.correct)
        upstream = torch.linspace(-1, 1, N, dtype=D)
        sums = [s.lse @ upstream + s.target_log_prob.sum() - 2 * (s.entropy @ upstream) for s in (stats, expected)]
        got = torch.autograd.grad(loss + sums[0], (x, w, b))
        found = torch.autograd.grad(want + sums[1], (x, w, b))
    for a, c in zip(got, found, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", range(1, N + 1))
def test_the_chunk_does_not_show(size: int, cpu_kernels: None) -> None:
    x, w, b = leaves(D)
    target = torch.arange(N)
    results = []
    for chunk in ((size, V), (size, 3 * size), (N, V)):
        with chunked(chunk):
            loss = softce.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1)
            results.append((loss, *torch.autograd.grad(loss, (x, w, b))))  # type: ignore[arg-type]
    for found in results[:-1]:
        for a, c in zip(found, results[-1], strict=True):
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-13)


@by_chunk
def test_masked_vocabulary(chunk: tuple[int, int] | None, cpu_kernels: None) -> None:
    """A bias of -inf: whole tiles of it too, and an infinite loss where the target is one of them."""
    x, w, _ = leaves(D)
    bias = torch.zeros(V, dtype=D)
    bias[16:] = -torch.inf
    target = torch.arange(N).clamp(max=12)
    with chunked(chunk):
        loss, stats = softce.linear_cross_entropy(x, w, target, linear_bias=bias, return_stats=True)
        got = torch.autograd.grad(loss, (x, w))
        target[3] = 20
        rows = softce.linear_cross_entropy(x, w, target, linear_bias=bias, reduction="none")
    want = F.cross_entropy(F.linear(x, w[:16]), torch.arange(N).clamp(max=12))
    torch.testing.assert_close(loss, want)
    for a, c in zip(got, torch.autograd.grad(want, (x, w)), strict=True):
        torch.testing.assert_close(a, c)
    assert stats.entropy.isfinite().all()
    assert rows[3] == torch.inf and rows.isfinite().sum() == N - 1


# ---- log-probabilities ----


@by_chunk
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_logprobs(chunk: tuple[int, int] | None, softcap: float | None, cpu_kernels: None) -> None:
    x, w, b = leaves(D)
    assert b is not None
    index = torch.arange(N)
    index[2] = -100
    logits = F.linear(x, w, b)
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / 1.7
    logp = logits.log_softmax(1)
    valid = index != -100
    want = torch.where(valid, logp.gather(1, index.clamp(min=0)[:, None]).squeeze(1), 0.0)
    entropy = torch.where(valid, -(logp.exp() * logp).sum(1), 0.0)
    with chunked(chunk):
        got = softce.linear_logprobs(x, w, index, 1.7, b, softcap=softcap)
        torch.testing.assert_close(got.log_prob, want)
        torch.testing.assert_close(got.entropy, entropy)
        u, v = torch.linspace(-1, 1, N, dtype=D), torch.linspace(2, -1, N, dtype=D)
        found = torch.autograd.grad(got.log_prob @ u + got.entropy @ v, (x, w, b))
    for a, c in zip(found, torch.autograd.grad(want @ u + entropy @ v, (x, w, b)), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-11, atol=1e-12)


def test_logprobs_shapes(cpu_kernels: None) -> None:
    x, w, index = torch.randn(2, 5, H), torch.randn(V, H), torch.randint(V, (2, 5))
    log_prob, entropy = softce.linear_logprobs(x, w, index)
    assert log_prob.shape == entropy.shape == (2, 5)
    shifted = softce.linear_logprobs(x, w, index, shift=True)
    torch.testing.assert_close(shifted.log_prob, softce.linear_logprobs(x[:, :-1], w, index[:, 1:]).log_prob)
    with pytest.raises(RuntimeError, match=r"index of dtype torch\.int64"):
        softce.linear_logprobs(x, w, index.float())


@by_chunk
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, D])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, D])
def test_linear_teacher_of_another_dtype(
    student: torch.dtype, dtype: torch.dtype, frozen: bool, chunk: tuple[int, int] | None
) -> None:
    maps = leaves(student)
    x, w, b = maps
    teacher = [(torch.randn(s) / 2).to(dtype).requires_grad_(not frozen) for s in ((N, 4), (V, 4), (V,))]
    wanted = [t for t in (*maps, *teacher) if t is not None and t.requires_grad]
    with chunked(chunk):
        loss = softce.linear_cross_entropy(x, w, softce.LinearTeacher(*teacher, 2.0), linear_bias=b)
    assert isinstance(loss, torch.Tensor) and loss.dtype == torch.promote_types(student, dtype)
    x, w, b, hidden, weight, bias = (t.double() for t in (*maps, *teacher) if t is not None)
    want = F.cross_entropy(F.linear(x, w, b), torch.softmax(F.linear(hidden, weight, bias) / 2.0, -1))
    close(loss, want, loss.dtype if torch.bfloat16 in (student, dtype) else torch.float32, "loss")
    for leaf, got, true in zip(
        wanted, torch.autograd.grad(loss, wanted), torch.autograd.grad(want, wanted), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert (got - true).norm() <= (5e-3 if leaf.dtype == torch.bfloat16 else 1e-5) * true.norm() + 1e-7
