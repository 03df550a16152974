# SPDX-License-Identifier: BSD-3-Clause
"""``softce.cross_entropy`` is torch's: values, gradients, dtypes, shapes and edges, against torch and the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, SHAPES, Case, cases, lay_out
from checks import EPS, ULPS, assert_rounded_once, kernel_calls, require_backend, run, same
from oracle import Result, evaluate
from torch import Tensor

import softce

INF, NAN = math.inf, math.nan
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@cache
def expected(case: Case, dtype: torch.dtype) -> tuple[Any, Result]:
    """Upstream gradient (of any size where there is one loss a row) and the oracle's answer."""
    input, target, kwargs = case.make("cpu", dtype)
    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    upstream = torch.linspace(-2, 1.5, math.prod(rows)).reshape(rows) if case.reduction == "none" else None
    if upstream is not None:
        upstream = upstream.to(dtype)  # not promoted: what reaches the loss in any dtype
    return upstream, evaluate(input, target, **kwargs, upstream=1.0 if upstream is None else upstream)


def assert_same_as_torch(input: Tensor, target: Tensor, backend: str = "auto", **kwargs: Any) -> None:
    """Loss and gradient equal torch's: dtype and shape exactly, values to the rounding of two ways to compute them."""
    want_loss, want_grad = run(F.cross_entropy, input, target, **kwargs)
    got_loss, got_grad = run(softce.cross_entropy, input, target, options=softce.Options(backend=backend), **kwargs)
    if backend == "cpu":  # a call without options has a shorter way to the same kernels
        quick_loss, quick_grad = run(softce.cross_entropy, input, target, **kwargs)
        assert same(quick_loss, got_loss) and same(quick_grad, got_grad)
    assert got_loss.dtype == want_loss.dtype
    assert got_loss.shape == want_loss.shape
    tolerance = 32 * EPS[input.dtype]
    torch.testing.assert_close(got_loss, want_loss, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(got_grad, want_grad, rtol=tolerance, atol=tolerance, equal_nan=True)


# ---- the table ----


def table() -> Iterator[Any]:
    """The kernels take every case in float32 and bfloat16, and a third of them in each of the other two, which share
    their code; the plain formula takes a part of that."""
    for i, case in enumerate(cases()):
        for j, dtype in enumerate(DTYPES):
            every = 1 if dtype in (torch.float32, torch.bfloat16) else 3
            for backend, share in (("cpu", every), ("reference", 2 * every if dtype == torch.float32 else 7)):
                if i % share == j % share:
                    yield pytest.param(case, dtype, backend, id=f"{case.name}-{str(dtype)[6:]}-{backend}")


@pytest.mark.parametrize(("case", "dtype", "backend"), table())
def test_value_and_gradient(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Against the oracle; where torch takes the call too, same dtype and shape, and no larger an error than torch's."""
    require_backend(backend)
    input, target, kwargs = case.make("cpu", dtype)
    upstream, want = expected(case, dtype)
    options = softce.Options(backend=backend)
    ours = run(softce.cross_entropy, input, target, upstream=upstream, options=options, **kwargs)
    if backend == "cpu":  # a call without options has a shorter way to the same kernels
        quick = run(softce.cross_entropy, input, target, upstream=upstream, **kwargs)
        assert same(quick[0], ours[0]) and same(quick[1], ours[1])
    assert_rounded_once(ours[0], want.loss, what="loss", scale=want.loss_scale)
    assert_rounded_once(ours[1], want.grad, what="gradient", scale=want.grad_scale)
    if not case.is_torch or (case.target == "uint8" and (input.dim() > 2 or case.weight)):  # uint8: torch raises
        return
    theirs = run(F.cross_entropy, input, target, upstream=upstream, **kwargs)
    scales = (want.loss_scale, want.grad_scale)
    for mine, other, exact, scale in zip(ours, theirs, (want.loss, want.grad), scales, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        error, torch_error = ((x.double() - exact).abs().max().item() for x in (mine, other))
        largest = max(scale, exact.abs().max().item())
        assert (
            error
            <= torch_error + ULPS[dtype] * EPS[torch.float64 if dtype == torch.float64 else torch.float32] * largest
        )


def test_gradient_is_accurate_over_many_classes(cpu_kernels: None) -> None:
    """Relative error of the gradient in float32 with smoothing, over 262,144 classes: at most 1e-6."""
    input = 3 * torch.randn(2, 262144)
    target = torch.tensor([5, 262143])
    want = evaluate(input, target, label_smoothing=0.1).grad
    _, grad = run(softce.cross_entropy, input, target, label_smoothing=0.1, options=softce.Options(backend="cpu"))
    assert (grad.double() - want).norm() / want.norm() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_run(cpu_kernels: None, dtype: torch.dtype) -> None:
    """A training step is one fused call; other calls are one pass forward and one backward."""
    x, y = torch.randn(8, 16, dtype=dtype).requires_grad_(), torch.arange(8)
    with kernel_calls() as calls:
        softce.cross_entropy(x, y).backward()
    fused = {"row_fused": 1} if dtype != torch.float16 else {"row_stats": 1, "row_grad": 1}
    assert calls == fused
    with kernel_calls() as calls:
        softce.cross_entropy(x, y, reduction="none").sum().backward()
    assert calls == {"row_stats": 1, "row_grad": 1}
    with kernel_calls() as calls, torch.no_grad():
        softce.cross_entropy(x, y)
    assert calls == {"row_stats": 1}
    with kernel_calls() as calls:
        softce.cross_entropy(x, y, options=softce.Options(backend="reference")).backward()
    assert not calls


# ---- arguments, as in torch ----


def test_positional_arguments_and_legacy_reduction(backend: str) -> None:
    x, y, w = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.rand(5)
    options = softce.Options(backend=backend)
    got = softce.cross_entropy(x, y, w, None, 2, None, "sum", 0.2, options=options)
    torch.testing.assert_close(got, F.cross_entropy(x, y, w, None, 2, None, "sum", 0.2))
    for size_average, reduce in (
        (True, None),
        (False, None),
        (None, False),
        (None, True),
        (False, False),
        (True, True),
    ):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            got = softce.cross_entropy(x, y, None, size_average, -100, reduce, options=options)
        with pytest.warns(UserWarning):
            torch.testing.assert_close(got, F.cross_entropy(x, y, None, size_average, -100, reduce))


def test_module_reads_its_attributes_at_each_call(options: softce.Options) -> None:
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    ours, theirs = softce.CrossEntropyLoss(options=options), torch.nn.CrossEntropyLoss()
    for name, value in (("reduction", "sum"), ("label_smoothing", 0.3), ("ignore_index", 0), ("weight", torch.rand(5))):
        setattr(ours, name, value)
        setattr(theirs, name, value)
        torch.testing.assert_close(ours(x, y), theirs(x, y))


def test_module_is_torchs() -> None:
    w = torch.rand(5)
    ours = softce.CrossEntropyLoss(w, None, 3, None, "sum", 0.1, temperature=2.0)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert dict(ours.named_buffers()).keys() == {"weight"}
    assert ours.to(torch.float64).weight.dtype == torch.float64
    assert (ours.ignore_index, ours.reduction, ours.label_smoothing, ours.temperature) == (3, "sum", 0.1, 2.0)
    other = softce.CrossEntropyLoss(torch.zeros(5))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.weight, w)
    with pytest.raises(TypeError, match="no_such_argument"):
        softce.CrossEntropyLoss(no_such_argument=1)


# ---- class indices ----


@by_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 2, 3)], ids=str)
def test_class_indices(shape: Any, weighted: bool, smoothing: float, reduction: str, backend: str) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    y = torch.randint(7, rows)
    if rows:
        y.view(-1)[1::3] = 4
    w = torch.rand(7, dtype=torch.float64) if weighted else None
    for ignore_index in (-100, 4):
        assert_same_as_torch(
            x, y, backend, weight=w, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )


def test_unbatched_weighted_mean_divides_by_the_weight(backend: str) -> None:
    x, w = torch.randn(3), torch.tensor([0.5, 2.0, 3.0])
    loss, _ = run(softce.cross_entropy, x, torch.tensor(1), weight=w, options=softce.Options(backend=backend))
    torch.testing.assert_close(loss, -x.log_softmax(0)[1])


@by_reduction
def test_unbatched_logits_with_one_target(reduction: str, backend: str) -> None:
    """(C,) with (1,): torch takes it in forward and fails in backward."""
    x = torch.randn(5)
    for target in (torch.tensor([2]), torch.tensor([2], dtype=torch.uint8)):
        theirs = F.cross_entropy(x, target, reduction=reduction)
        loss, grad = run(softce.cross_entropy, x, target, reduction=reduction, options=softce.Options(backend=backend))
        assert loss.shape == theirs.shape
        torch.testing.assert_close(loss, theirs)
        torch.testing.assert_close(grad, x.softmax(0) - F.one_hot(torch.tensor(2), 5))


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3), (2, 7, 2, 2)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_uint8_targets(shape: Any, smoothing: float, weighted: bool, options: softce.Options) -> None:
    """Equal to int64 targets, also where torch raises for them."""
    x = torch.randn(shape)
    y = torch.randint(7, shape[:1] + shape[2:])
    kwargs = {"label_smoothing": smoothing, "weight": torch.rand(7) if weighted else None, "options": options}
    for ignore_index in (-100, 2):
        want = run(softce.cross_entropy, x, y, ignore_index=ignore_index, **kwargs)
        got = run(softce.cross_entropy, x, y.to(torch.uint8), ignore_index=ignore_index, **kwargs)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 6, 7, 1000, -(2**62)])
def test_any_ignore_index(ignore_index: int, backend: str) -> None:
    """Also one that is no class; it is ignored before it is checked."""
    x, y = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 6, ignore_index, 3, ignore_index, 2])
    for smoothing in (0.0, 0.2):
        assert_same_as_torch(x, y, backend, ignore_index=ignore_index, label_smoothing=smoothing)


def test_strided_targets_and_weights(backend: str) -> None:
    x = torch.randn(6, 7)
    y, w = torch.randint(7, (6, 3))[:, 1], torch.rand(7, 2)[:, 0]
    assert_same_as_torch(x, y, backend, weight=w)
    assert_same_as_torch(x, torch.tensor(3).expand(6), backend, weight=torch.tensor(0.5).expand(7))
    x = torch.randn(2, 7, 3, 4)
    assert_same_as_torch(x, torch.randint(7, (2, 4, 3)).transpose(1, 2), backend, weight=w)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float32_weights_with_half_logits(half: torch.dtype, smoothing: float, backend: str) -> None:
    """Torch refuses them for class indices; here they are not rounded."""
    x, y, w = torch.randn(5, 7).to(half), torch.randint(7, (5,)), torch.rand(7)
    want = evaluate(x, y, weight=w, label_smoothing=smoothing)
    loss, grad = run(
        softce.cross_entropy, x, y, weight=w, label_smoothing=smoothing, options=softce.Options(backend=backend)
    )
    assert loss.dtype == half
    assert_rounded_once(loss, want.loss, what="loss")
    assert_rounded_once(grad, want.grad, what="gradient")


# ---- class probabilities ----


@by_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 2, 3)], ids=str)
def test_class_probabilities(shape: Any, weighted: bool, smoothing: float, reduction: str, backend: str) -> None:
    """Rows that do not sum to 1 included: the smoothing applies to them as they are."""
    x, t = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    w = torch.rand(7, dtype=torch.float64) if weighted else None
    assert_same_as_torch(x, t, backend, weight=w, reduction=reduction, label_smoothing=smoothing)


def test_negative_ignore_index_has_no_effect_on_probabilities(backend: str) -> None:
    assert_same_as_torch(torch.randn(3, 4), torch.rand(3, 4), backend, ignore_index=-1)


def test_negative_probabilities_are_taken_as_they_are(backend: str) -> None:
    assert_same_as_torch(torch.randn(3, 4), torch.randn(3, 4), backend, label_smoothing=0.1)


@pytest.mark.parametrize("input_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtype_promotion(input_dtype: torch.dtype, target_dtype: torch.dtype, reduction: str, backend: str) -> None:
    x, t = torch.randn(5, 7).to(input_dtype), torch.rand(5, 7).to(target_dtype)
    theirs = F.cross_entropy(x, t, reduction=reduction)
    options = softce.Options(backend=backend)
    loss, grad = run(softce.cross_entropy, x, t, reduction=reduction, options=options)
    assert loss.dtype == theirs.dtype
    want = evaluate(x, t, reduction=reduction)
    assert_rounded_once(loss, want.loss, what="loss")
    assert_rounded_once(grad, want.grad, what="gradient")
    for weight_dtype in DTYPES:
        w = torch.rand(7).to(weight_dtype)
        theirs = F.cross_entropy(x, t, weight=w, reduction=reduction)
        loss, _ = run(softce.cross_entropy, x, t, weight=w, reduction=reduction, options=options)
        assert loss.dtype == theirs.dtype, weight_dtype


@by_dtype
def test_loss_dtype_is_the_inputs(dtype: torch.dtype, options: softce.Options) -> None:
    x, y = torch.randn(5, 7, dtype=dtype), torch.randint(7, (5,))
    for reduction in ("mean", "sum", "none"):
        assert softce.cross_entropy(x, y, reduction=reduction, options=options).dtype == dtype


# ---- shapes and layouts ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 9, 4), (3, 4, 2, 5), (2, 3, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
def test_layouts_of_logits_and_targets(layout: str, shape: Any, dense: bool, backend: str) -> None:
    """Every pairing of the logits' layout with a contiguous target and the reverse."""
    x = torch.randn(shape, dtype=torch.float64)
    t = torch.rand(shape, dtype=torch.float64) if dense else torch.randint(shape[1], shape[:1] + shape[2:])
    for reduction in ("mean", "none"):
        assert_same_as_torch(lay_out(x, layout), t, backend, reduction=reduction)
        if dense:
            assert_same_as_torch(x, lay_out(t, layout), backend, reduction=reduction)
            assert_same_as_torch(lay_out(x, "transposed"), lay_out(t, layout), backend, reduction=reduction)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1), (0, 3, 2, 1), (1, 0, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_permuted_logits(order: Any, dtype: torch.dtype, backend: str) -> None:
    base = torch.randn(2, 3, 4, 5).to(dtype)
    x = base.permute(order)
    y = torch.randint(x.shape[1], (x.shape[0], *x.shape[2:]))
    if dtype == torch.bfloat16:
        loss, grad = run(softce.cross_entropy, x, y, options=softce.Options(backend=backend))
        want = evaluate(x, y)
        assert_rounded_once(loss, want.loss)
        assert_rounded_once(grad, want.grad)
    else:
        assert_same_as_torch(x, y, backend)


def test_gradient_reaches_the_storage_of_expanded_and_sliced_logits(backend: str) -> None:
    """Through autograd's own view functions, to the tensor that owns the memory."""
    y = torch.tensor([0, 2, 1])
    views = {
        "expanded rows": ((1, 4), lambda b: b.expand(3, 4)),
        "expanded classes": ((3, 1), lambda b: b.expand(3, 4)),
        "slice": ((3, 9), lambda b: b[:, 2:6]),
        "every other class": ((3, 8), lambda b: b[:, ::2]),
        "reversed order": ((4, 3), lambda b: b.t()),
        "every other row": ((6, 4), lambda b: b[::2]),
    }
    for name, (shape, view) in views.items():
        base = torch.randn(shape, dtype=torch.float64)
        grads = []
        for function in (F.cross_entropy, softce.cross_entropy):
            leaf = base.clone().requires_grad_()
            kwargs = {"options": softce.Options(backend=backend)} if function is softce.cross_entropy else {}
            function(view(leaf), y, **kwargs).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[1], grads[0], msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_are_left_alone(shape: Any, options: softce.Options) -> None:
    x = torch.randn(shape, requires_grad=True)
    before, version = x.detach().clone(), x._version
    t = torch.rand(shape)
    softce.cross_entropy(x, t, options=options).backward()
    assert torch.equal(x, before) and x._version == version


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


# ---- errors: torch's types, and messages that name the argument ----

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])
T = torch.rand(3, 4)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "batch": ((X, torch.tensor([0, 1])), {}, ValueError, r"input batch_size \(3\) to match target batch_size \(2\)"),
    "batch of probabilities": ((X, torch.rand(2, 4)), {}, ValueError, r"batch_size \(3\) to match target batch_size"),
    "0-dim target": ((X, torch.tensor(0)), {}, ValueError, "batch_size"),
    "spatial": ((torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64)), {}, RuntimeError, "Expected target size"),
    "spatial probabilities": ((torch.randn(2, 3, 5), torch.rand(2, 3, 4)), {}, RuntimeError, "target"),
    "more dimensions": ((X, torch.zeros(3, 1, dtype=torch.int64)), {}, RuntimeError, "target"),
    "unbatched": ((torch.randn(4), torch.tensor([0, 1])), {}, ValueError, "size 1, but got target size: .*2"),
    "int32": ((X, Y.int()), {}, RuntimeError, "expected target dtype to be Long or Byte, but got torch.int32"),
    "int16": ((X, Y.short()), {}, RuntimeError, "Long or Byte"),
    "int8": ((X, Y.to(torch.int8)), {}, RuntimeError, "Long or Byte"),
    "bool": ((X, Y.bool()), {}, RuntimeError, "Long or Byte"),
    "float indices": ((X, Y.float()), {}, RuntimeError, "Long or Byte"),
    "int64 of the input's shape": (
        (X, T.long()),
        {},
        RuntimeError,
        "Expected floating point type for target with class",
    ),
    "out of range": ((X, torch.tensor([0, 4, 2])), {}, IndexError, "4"),
    "negative": ((X, torch.tensor([0, -1, 2])), {}, IndexError, "-1"),
    "out of range, smoothed": ((X, torch.tensor([0, 4, 2])), {"label_smoothing": 0.1}, IndexError, "4"),
    "out of range, planes": ((torch.randn(1, 4, 3), torch.tensor([[0, 9, 2]])), {}, IndexError, "9"),
    "ignored index, not given": ((X, torch.tensor([0, -100, 2])), {"ignore_index": 0}, IndexError, "-100"),
    "weight shape": (
        (X, Y),
        {"weight": torch.rand(3)},
        RuntimeError,
        "weight tensor should be defined either for all 4",
    ),
    "weight 2d": ((X, Y), {"weight": torch.rand(1, 4)}, RuntimeError, "weight"),
    "weight dtype": ((X, Y), {"weight": torch.rand(4).double()}, RuntimeError, "weight.*"),
    "weight half": ((X, Y), {"weight": torch.rand(4).half()}, RuntimeError, "weight"),
    "weight double for half": ((X.half(), Y), {"weight": torch.rand(4).double()}, RuntimeError, "weight"),
    "weight requires grad": ((X, Y), {"weight": torch.rand(4, requires_grad=True)}, RuntimeError, "weight"),
    "weight shape, probabilities": ((X, T), {"weight": torch.rand(3)}, RuntimeError, "weight"),
    "ignore_index, probabilities": (
        (X, T),
        {"ignore_index": 1},
        RuntimeError,
        "ignore_index is not supported for floating",
    ),
    "reduction": ((X, Y), {"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
    "reduction None": ((X, Y), {"reduction": None}, ValueError, "reduction"),
    "label_smoothing": ((X, Y), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0"),
    "label_smoothing, probabilities": ((X, T), {"label_smoothing": 1.01}, RuntimeError, "label_smoothing"),
    "scalar input": ((torch.tensor(1.0), torch.tensor(0)), {}, Exception, "input|dimension|target"),
    "integer input": ((T.long(), Y), {}, NotImplementedError, "input|not implemented"),
    "input type": (([1.0, 2.0], Y), {}, TypeError, "input"),
    "target type": ((X, [0, 1, 2]), {}, TypeError, "target"),
    "target None": ((X, None), {}, TypeError, "target"),
    "weight type": ((X, Y), {"weight": [1.0] * 4}, TypeError, "weight"),
    "ignore_index type": ((X, Y), {"ignore_index": 1.5}, TypeError, "ignore_index"),
    "label_smoothing type": ((X, Y), {"label_smoothing": "much"}, TypeError, "label_smoothing"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, options: softce.Options) -> None:
    """The type that torch raises for the same call, and a message that says what is wrong."""
    args, kwargs, kind, message = ERRORS[name]
    with pytest.raises(kind):
        F.cross_entropy(*args, **kwargs).backward()
    for more in ({"options": options}, {}):
        with pytest.raises(kind, match=message):
            softce.cross_entropy(*args, **more, **kwargs)


def test_no_gradient_of_an_index_out_of_range(options: softce.Options) -> None:
    """The error comes at the call, also when a gradient is wanted, and for every place that the index can stand in."""
    for rows in (1, 40, 3000):
        for bad in (rows - 1, 0, rows // 2):
            for value in (4, 2**40, -(2**40), -101):
                y = torch.zeros(rows, dtype=torch.int64)
                y[bad] = value
                for more in ({"options": options}, {}):
                    with pytest.raises(IndexError, match=str(value)):
                        softce.cross_entropy(torch.randn(rows, 4, requires_grad=True), y, **more)


def test_negative_label_smoothing_is_taken_as_zero(options: softce.Options) -> None:
    torch.testing.assert_close(F.cross_entropy(X, Y, label_smoothing=-0.5), F.cross_entropy(X, Y))
    with pytest.warns(UserWarning, match="label_smoothing"):
        got = softce.cross_entropy(X, Y, label_smoothing=-0.5, options=options)
    torch.testing.assert_close(got, F.cross_entropy(X, Y))


def test_weight_that_requires_grad_is_fine_where_torch_takes_it(backend: str) -> None:
    """With probabilities, and under no_grad."""
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    grads = []
    for function in (F.cross_entropy, softce.cross_entropy):
        leaf = x.clone().requires_grad_()
        kwargs = {"options": softce.Options(backend=backend)} if function is softce.cross_entropy else {}
        grads.append(torch.autograd.grad(function(leaf, t, weight=w, label_smoothing=0.1, **kwargs), (leaf, w)))
    torch.testing.assert_close(grads[1], grads[0])
