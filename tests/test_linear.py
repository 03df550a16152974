# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear losses give the values and gradients of the same loss on whole logits, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import ROW_LOSSES, TARGETS, Case
from checks import same
from oracle import evaluate
from torch import Tensor

import softce
from softce import Options
from softce.linear.chunks import Chunking

D = torch.float64
N, H, V = 13, 6, 41
CHUNKS = {"chosen": None, "rows": (5, V), "tiles": (5, 16), "one": (N, V), "thin": (1, 7)}
by_chunk = pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)

CASES = [
    *(Case((N, V), target, options) for target in TARGETS for options in ("plain", "none", "everything")),
    *(Case((N, V), target, "smoothed", weight=True) for target in ("ignored", "probs", "topk_uniform", "teacher_kl")),
    *(Case((N, V), target, row_loss=row_loss) for target in ("ignored", "teacher_kl") for row_loss in ROW_LOSSES),
    *(Case((N, V), target, "smoothed_sum", row_weight=True, weight=True) for target in ("mixup", "unnormalised")),
    Case((N, V), "ignored", "others", row_weight=True, row_loss="poly1"),
    Case((N, V), "topk", "everything_none", row_weight=True, weight=True, row_loss="focal"),
]


@contextmanager
def chunked(chunk: tuple[int, int] | None) -> Iterator[None]:
    """Every block of logits has this many rows and classes."""
    if chunk is None:
        yield
        return
    with mock.patch("softce.linear.loop.choose", lambda rows, classes, *_, tiles=True: _fit(chunk, classes, tiles)):
        yield


def _fit(chunk: tuple[int, int], classes: int, tiles: bool) -> Chunking:
    return Chunking(chunk[0], min(chunk[1], classes) if tiles else classes)


def leaves(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias whose logits are a few units."""
    g = torch.Generator().manual_seed(7)
    made = (torch.randn(N, H, generator=g), torch.randn(V, H, generator=g), torch.randn(V, generator=g))
    x, w, b = (t.to(dtype).requires_grad_() for t in made)
    return x, w, b if bias else None


def truth(
    maps: tuple[Tensor | None, ...], target: Any, upstream: Any, kwargs: dict[str, Any]
) -> tuple[Any, list[Tensor]]:
    """The oracle's result and the float64 gradients of input, weight and bias."""
    x, w, b = (None if t is None else t.detach().double() for t in maps)
    assert x is not None and w is not None
    if isinstance(target, softce.LinearTeacher):
        target = softce.Teacher(
            F.linear(target.hidden.double(), target.linear_weight.double()),
            target.temperature,
            target.scale_loss,
            target.divergence,
        )
    want = evaluate(F.linear(x, w, b), target, upstream=upstream, **kwargs)
    return want, [want.grad @ w, want.grad.t() @ x, *([] if b is None else [want.grad.sum(0)])]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """Relative Frobenius error: rounding of a float32 or float64 computation; half precision rounds that once."""
    got = got.detach().double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: {got} instead of {want}"
    error = (got - want)[~want.isnan()].norm()
    size = want[~want.isnan()].norm()
    if dtype in (torch.bfloat16, torch.float16):
        once = (want.to(dtype).double() - want)[~want.isnan()].norm()
        assert error <= 1.2 * once + 2e-6 * size + 1e-7, f"{what}: error {error:.3g}, rounding once {once:.3g}"
    else:
        limit = {torch.float32: 1e-5, D: 1e-12}[dtype]
        assert error <= limit * size + limit * 0.1, f"{what}: error {error:.3g} of {size:.3g}"


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
