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
from checks import EPS, ULPS, assert_rounded_once, assert_same_as_torch, kernel_calls, require_backend, run, same
from oracle import Result, evaluate

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
    """A training step is one fused call, in float16 behind the statistics; others are a pass forward, one backward."""
    x, y = torch.randn(8, 16, dtype=dtype).requires_grad_(), torch.arange(8)
    with kernel_calls() as calls:
        softce.cross_entropy(x, y).backward()
    assert calls == ({"row_fused": 1} if dtype != torch.float16 else {"row_stats": 1, "row_fused": 1})
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
