# SPDX-License-Identifier: BSD-3-Clause
"""The compiled CPU kernels at their edges: infinite, huge and nan logits, denominators, bad indices, accuracy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_truth import (
    DTYPES,
    IGNORE,
    INF,
    KINDS,
    NAN,
    Truth,
    assert_gradient,
    check,
    fused_of,
    isa,
    logits_for,
    opposed,
    rows_of,
    spec_for,
    stats_of,
    target_for,
    tolerance,
)
from torch import Tensor

from softce import ops
from softce.ops import COUNT, LOSS, LSE, MASS, KernelTarget, Spec

__all__ = ["isa"]  # the fixture

LAYOUTS = {"short": 12, "long": 3000, "planes": 12}


def edge_logits(layout: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Logits of ``rows`` rows, and their (R, C) view for setting values."""
    classes = LAYOUTS[layout]
    x = torch.randn(rows, classes).to(dtype)
    if layout != "planes":
        return x, x
    block = x.t().contiguous()[None]
    return block, block[0].t()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinite_and_huge_logits(isa: str, layout: str, dtype: torch.dtype) -> None:
    x, rows = edge_logits(layout, 9, dtype)
    huge = torch.finfo(dtype).max * 0.99
    rows[0, 3] = -INF  # not the target: fine
    rows[1, 0] = -INF  # the target: inf, with a finite gradient
    rows[2] = -INF
    rows[3, 5] = INF
    rows[4, 5] = NAN
    rows[5], rows[5, 0] = NAN, INF  # ignored
    rows[6] = huge
    rows[7], rows[7, 0] = -huge, huge
    index = torch.zeros(9, 1, dtype=torch.int64)
    index[5] = IGNORE
    target = KernelTarget(index=index)
    stats = stats_of(x, target, Spec())
    loss = stats[LOSS]
    assert (
        bool(loss[[0, 6, 7, 8]].isfinite().all()) and loss[1] == INF and bool(loss[2:5].isnan().all()) and loss[5] == 0
    )
    assert torch.equal(stats[:, 5], torch.zeros(4, dtype=stats.dtype))
    torch.testing.assert_close(loss[6].double(), torch.tensor(math.log(LAYOUTS[layout])).double(), rtol=1e-5, atol=0)
    assert loss[7] == 0
    _, with_stats, _ = fused_of(x, target, Spec(), mean=False)
    total, g, _ = fused_of(x, target, Spec(), mean=False, stats=False)
    torch.testing.assert_close(g, with_stats, rtol=0, atol=0, equal_nan=True)
    assert bool(total.isnan())
    g = rows_of(g)
    assert bool(g[[0, 1, 6, 7, 8]].isfinite().all()) and bool(g[2:5].isnan().all())
    assert bool((g[5] == 0).all()) and g[0, 3] == 0 and abs(float(g[1, 0]) + 1) < 1e-6
    # With smoothing the -inf logits do have target weight.
    loss = stats_of(x, target, Spec(mix_a=0.9, mix_b=0.1 / LAYOUTS[layout]))[LOSS]
    assert loss[0] == INF and loss[1] == INF and bool(loss[2:5].isnan().all()) and loss[5] == 0
    torch.testing.assert_close(loss[6].double(), torch.tensor(math.log(LAYOUTS[layout])).double(), rtol=1e-5, atol=0)
    coef = torch.ones(2, 9, dtype=stats.dtype)
    assert bool((rows_of(ops.row_grad(x, stats[LSE], coef, *target, IGNORE, list(Spec())))[5] == 0).all())
    coef[:, 4] = 0  # coefficients of 0 give an exact 0 whatever the logits hold
    assert bool((rows_of(ops.row_grad(x, stats[LSE], coef, *target, IGNORE, list(Spec())))[4] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_of_hardly_any_probability(isa: str, layout: str, dtype: torch.dtype) -> None:
    """Losses around and beyond what exp can tell: there the logit itself has to."""
    depths = torch.tensor([1.0, 20, 80, 86, 87.3, 87.4, 88, 95, 103.5, 110, 200, 700, 708.5, 745, 760, 1e4])
    x, rows = edge_logits(layout, len(depths), dtype)
    rows[:, 0] = -depths.to(dtype)
    index = torch.zeros(len(depths), 1, dtype=torch.int64)
    weight = torch.rand(LAYOUTS[layout], dtype=ops.acc_dtype(dtype)) + 0.5
    for spec in (Spec(), Spec(mix_a=0.9, mix_b=0.1 / LAYOUTS[layout])):
        check(x, KernelTarget(index=index), spec)
        check(x, KernelTarget(index=index, weight=weight), spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_weight_on_a_masked_class(isa: str, layout: str, dtype: torch.dtype) -> None:
    """0 * (-inf) is 0: probabilities, class weights, teachers."""
    x, rows = edge_logits(layout, 4, dtype)
    rows[:, 3:6] = -INF
    dense = torch.zeros_like(x)
    dense_rows = dense[0].t() if layout == "planes" else dense
    dense_rows[:, 0], dense_rows[:, 1] = 0.25, 0.75
    check(x, KernelTarget(dense=dense), Spec())
    teacher = dense.clone()
    (teacher[0].t() if layout == "planes" else teacher)[:, 3:6] = -INF
    check(x, KernelTarget(dense=teacher), Spec(dense_kind=1.0))
    weight = torch.ones(LAYOUTS[layout], dtype=ops.acc_dtype(dtype))
    weight[3:6] = 0
    index = torch.zeros(4, 1, dtype=torch.int64)
    check(x, KernelTarget(index=index, weight=weight), Spec(mix_a=0.9, mix_b=0.01))
    check(x, KernelTarget(dense=dense, weight=weight), Spec(mix_a=0.9, mix_b=0.01))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_class_whose_weight_has_parts_of_both_signs(
    isa: str, kind: str, layout: str, dtype: torch.dtype
) -> None:
    """Only their sum counts: 0 * (-inf) is 0, and what is left over has one infinity."""
    x, rows = edge_logits(layout, 7, dtype)
    rows[1::2, 3] = -INF
    rows[3] += 80.0  # its maximum is taken off before exp
    weight = torch.rand(x.shape[1], dtype=ops.acc_dtype(dtype)) + 0.5
    row_weight = torch.arange(7, dtype=ops.acc_dtype(dtype))
    for e in (0.0, 0.125, -0.0625):
        target, spec = opposed(kind, x, e)
        masked = stats_of(x, target, spec)[LOSS, 1::2]
        infinite = INF if e > 0 else -INF
        assert bool((masked.isfinite() if e == 0 else masked == infinite).all()), f"{e}: {masked}"
        check(x, target, spec)
        check(x, target, spec, extras=True)
        check(x, target, spec._replace(z_loss=0.01), row_weight=row_weight)
        check(x, target._replace(weight=weight), spec)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [-1000.0, -60.0, 30.0, 70.0, 1000.0, 30000.0])
@pytest.mark.parametrize("kind", ("indices", "probs", "teacher"))
def test_logits_far_from_zero(isa: str, layout: str, offset: float, kind: str) -> None:
    """A constant on all logits changes no loss and no gradient."""
    x, _ = edge_logits(layout, 5, torch.float64)
    target = target_for(kind, x)
    spec = spec_for(kind, x.shape[1], mix_a=0.9, mix_b=0.1 / x.shape[1])
    near, far = stats_of(x, target, spec), stats_of(x + offset, target, spec)
    torch.testing.assert_close(near[LOSS], far[LOSS], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(near[LSE] + offset * (near[LSE] != 0), far[LSE], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        fused_of(x, target, spec)[1], fused_of(x + offset, target, spec)[1], rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_denominators(isa: str, layout: str) -> None:
    x, _ = edge_logits(layout, 4, torch.float32)
    ignored = KernelTarget(index=torch.full((4, 1), IGNORE))
    loss, g, _ = fused_of(x, ignored, Spec())
    assert loss.isnan() and bool((g == 0).all())
    assert fused_of(x, ignored, Spec(), mean=False)[0] == 0
    loss, g, _ = fused_of(x, ignored, Spec(empty_zero=1.0))
    assert loss == 0 and bool((g == 0).all())
    worthless = KernelTarget(index=torch.zeros(4, 1, dtype=torch.int64), weight=torch.zeros(x.shape[1]))
    loss, g, _ = fused_of(x, worthless, Spec())
    assert loss.isnan() and bool(g.isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_and_no_rows(isa: str, kind: str) -> None:
    for shape in ((4, 1), (2, 1, 3)):
        x = logits_for(shape, torch.float32)
        stats = stats_of(x, target_for(kind, x), spec_for(kind, 1))
        assert bool((stats[LOSS].abs() < 1e-6).all())
    x = torch.zeros(0, 5)
    loss, g, stats = fused_of(x, target_for(kind, x), spec_for(kind, 5))
    assert loss.isnan() and g.shape == (0, 5) and stats.shape == (4, 0)
    assert fused_of(x, target_for(kind, x), spec_for(kind, 5), mean=False)[0] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_written_before_a_bad_index_is_found(isa: str, layout: str) -> None:
    x, _ = edge_logits(layout, 40, torch.float32)
    for bad in (-1, x.shape[1], 2**40, -(2**63)):
        index = torch.zeros(40, 1, dtype=torch.int64)
        index[37] = bad
        before = x.clone()
        with pytest.raises(IndexError, match="out of range"):
            ops.row_fused_(x, *KernelTarget(index=index), None, IGNORE, list(Spec()), True, False)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("shape", "mix"), [((4, 262144), 0.1), ((64, 1000), 0.0), ((4096, 10), 0.1), ((1, 21, 4096), 0.0)]
)
def test_float32_is_no_less_accurate_than_torch(isa: str, shape: tuple[int, ...], mix: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    target = KernelTarget(index=torch.randint(0, shape[1], (len(rows_of(x)), 1)))
    assert target.index is not None
    spec = Spec(mix_a=1 - mix, mix_b=mix / shape[1])
    truth = Truth(x, target, spec)
    want_loss, want, _ = truth.fused(None, True)
    loss, g, _ = fused_of(x, target, spec)
    leaf = x.clone().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(leaf, target.index.view(len(x), *shape[2:]), label_smoothing=mix)
    theirs.backward()
    assert leaf.grad is not None

    def error(got: Tensor) -> float:
        return float((rows_of(got).double() - want).norm() / want.norm())

    assert error(g) <= max(error(leaf.grad), 1e-7)
    assert error(g) <= 1e-6
    assert abs(float(loss) - float(want_loss)) <= max(abs(float(theirs) - float(want_loss)), 1e-6 * float(want_loss))


def test_statistics_rows(isa: str) -> None:
    """MASS and COUNT where they differ: class weights with smoothing."""
    weight = torch.tensor([0.5, 2.0, 1.0])
    stats = stats_of(
        torch.randn(2, 3), KernelTarget(index=torch.tensor([[1], [IGNORE]]), weight=weight), Spec(mix_a=0.4, mix_b=0.2)
    )
    torch.testing.assert_close(stats[MASS], torch.tensor([0.4 * 2.0 + 0.2 * 3.5, 0.0]))
    torch.testing.assert_close(stats[COUNT], torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("kind", ["indices", "probs", "teacher"])
def test_finite_masks(isa: str, dtype: torch.dtype, temperature: float, kind: str) -> None:
    """Leading classes masked by a large finite number, whatever the other logits are around."""
    for mask in (torch.finfo(dtype).min, -1e10, -1e4):
        for others in (0.0, 100.0, -100.0, 300.0, -300.0, 520.0):
            for classes, masked in ((100, 64), (5000, 100), (40000, 20000)):
                x = logits_for((2, classes), dtype) + others
                x[:, :masked] = mask
                target = target_for(kind, x)
                spec = spec_for(kind, classes, temperature=temperature)._replace(dense_temperature=temperature)
                if target.index is not None:
                    target.index[:] = classes - 1
                else:
                    assert target.dense is not None
                    target.dense[:, :masked] = mask if kind == "teacher" else 0.0
                loss, g, stats = fused_of(x, target, spec, mean=False)
                truth = Truth(x, target, spec)
                want, gradient, _ = truth.fused(None, False)
                close = {"rtol": 4 * tolerance(dtype), "atol": 8 * tolerance(dtype)}
                # x / temperature is rounded before anything is taken off it.
                eps = torch.finfo(ops.acc_dtype(dtype)).eps * (8 + abs(others) / temperature)
                largest = float(gradient.abs().max())
                torch.testing.assert_close(
                    g.double(), gradient, rtol=torch.finfo(dtype).eps, atol=2 * eps * largest, msg=f"{mask} {others}"
                )
                torch.testing.assert_close(stats[LSE].double(), truth.lse, **close)
                torch.testing.assert_close(loss.double(), want, **close)


@pytest.mark.parametrize("others", [0.0, -300.0, -1000.0])
@pytest.mark.parametrize("kind", ["indices", "probs", "teacher"])
def test_blocks_of_nothing(isa: str, others: float, kind: str) -> None:
    """Whole blocks of -inf before the first finite logit."""
    x = logits_for((2, 40000), torch.float32) + others
    x[:, :33000] = -INF
    target = target_for(kind, x)
    if target.index is not None:
        target.index[:] = 35000
    elif target.dense is not None:
        target.dense[:, :33000] = -INF if kind == "teacher" else 0.0
    spec = spec_for(kind, 40000)
    _, g, _ = fused_of(x, target, spec, mean=False)
    _, want, push = Truth(x, target, spec).fused(None, False)
    assert_gradient(g, want, "nothing", push)


@pytest.mark.parametrize("kind", ["indices", "probs", "teacher"])
def test_negative_logits_of_half_precision(isa: str, kind: str) -> None:
    """Where all are negative the order of their bits is not their own: near 0 and far below, one after the other, with
    masks and nan of either sign between them."""
    classes = 40000
    depths = (-0.25, -30.0, -60.0, -90.0, -5000.0)
    pairs = [(a, b) for a in depths for b in depths]
    noise = -torch.rand(len(pairs) + 2, classes)
    x = noise.to(torch.bfloat16)
    for row, (first, second) in enumerate(pairs):
        x[row, :20000] = (noise[row, :20000] + first).to(torch.bfloat16)
        x[row, 20000:] = (noise[row, 20000:] + second).to(torch.bfloat16)
        x[row, row : row + 3000] = -INF
    target = target_for("indices" if kind == "indices" else "teacher", x)
    if target.index is not None:
        target.index[:] = 39000
    elif kind == "probs":
        target = KernelTarget(dense=(x != -INF).to(torch.bfloat16) / 32768)
    x.view(torch.int16)[-2:, 30000] = torch.tensor([0x7FC0, 0xFFC0 - 0x10000], dtype=torch.int16)
    assert bool(x[-2:, 30000].isnan().all())
    spec = Spec() if kind == "probs" else spec_for(kind, classes)
    _, g, stats = fused_of(x, target, spec, mean=False)
    assert bool(g[-2:].isnan().all()) and bool(stats[LSE, -2:].isnan().all())
    part = KernelTarget(*(t if t is None else t[:-2] for t in target))
    truth = Truth(x[:-2], part, spec)
    _, want, push = truth.fused(None, False)
    assert_gradient(g[:-2], want, "negative", push)
    torch.testing.assert_close(stats[LSE, :-2].double(), truth.lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["probs", "teacher"])
def test_large_weights_among_streamed_rows(isa: str, kind: str) -> None:
    """Rows whose gradient is too large for the short way of rounding, before and after others."""
    classes = 33024  # whole lines a row: rows are cut alike wherever they lie
    x = logits_for((130, classes), torch.bfloat16)
    assert x.nbytes > 8 << 20
    target, spec = target_for(kind, x), spec_for(kind, classes, mix_a=0.9, mix_b=0.1 / classes)
    row_weight = torch.ones(130)
    row_weight[[3, 4, 70, 129]] = 2.0**120
    _, g, _ = fused_of(x, target, spec, row_weight, mean=False)
    assert bool(g.isfinite().all()) and bool((g != 0).any(1).all())
    for rows in (slice(2, 6), slice(69, 72), slice(127, 130)):
        part = KernelTarget(*(t if t is None else t[rows] for t in target))
        _, few, _ = fused_of(x[rows], part, spec, row_weight[rows], mean=False)
        assert torch.equal(g[rows], few)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["short", "planes"])
def test_rows_without_a_gradient_among_many(isa: str, layout: str, dtype: torch.dtype) -> None:
    """64 rows fill whole vectors: nothing else there asks for a look at rows whose gradient is 0."""
    x, rows = edge_logits(layout, 64, dtype)
    rows[5] = NAN
    target = KernelTarget(torch.randint(12, (64, 1)))
    acc = ops.acc_dtype(dtype)
    row_weight = torch.ones(64, dtype=acc)
    row_weight[5] = 0
    spec = Spec()
    _, grad, _ = fused_of(x, target, spec, row_weight, mean=False)
    coef = torch.stack((row_weight, row_weight))
    again = ops.row_grad(x, stats_of(x, target, spec)[LSE], coef, *target, IGNORE, spec)
    want = torch.softmax(rows.double(), 1) - torch.nn.functional.one_hot(target.index[:, 0], 12)
    want[5] = 0
    for found in (grad, again):
        assert torch.equal(rows_of(found)[5], torch.zeros(12, dtype=dtype))
        assert_gradient(rows_of(found), want, "gradient", weight=1.0)


@pytest.mark.parametrize("layout", ["short", "planes"])
def test_certain_predictions_beside_a_row_out_of_range(isa: str, layout: str) -> None:
    """The weight of row 0 takes its group's entries out of the units of e; p = 1 still has no gradient at all."""
    x, rows = edge_logits(layout, 64, torch.float32)
    rows[1:, 1:] -= 300
    rows[1:, 0] = torch.arange(1.0, 64.0)
    target = KernelTarget(torch.zeros(64, 1, dtype=torch.int64))
    row_weight = torch.ones(64)
    row_weight[0] = 1e-30
    _, grad, _ = fused_of(x, target, Spec(), row_weight, mean=False)
    assert torch.equal(rows_of(grad)[1:, 0], torch.zeros(63))
    check(x, target, Spec(), row_weight=row_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 0), (1, 0, 3)], ids=["rows", "planes"])
def test_no_class_at_all(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, acc = torch.zeros(shape, dtype=dtype), ops.acc_dtype(dtype)
    ignored = KernelTarget(torch.full((3, 1), IGNORE))
    for target in (ignored, KernelTarget(dense=torch.zeros(shape, dtype=dtype))):
        stats = stats_of(x, target, Spec())
        assert torch.equal(stats[LOSS], torch.zeros(3, dtype=acc))
        loss, grad, again = fused_of(x, target, Spec())
        assert math.isnan(loss) and grad.shape == shape and torch.equal(stats, again)
        assert fused_of(x, target, Spec(), mean=False)[0] == 0
        grad = ops.row_grad(x, stats[LSE], torch.ones(2, 3, dtype=acc), *target, IGNORE, list(Spec()))
        assert grad.shape == shape and grad.dtype == dtype
        ops.row_grad_(x, stats[LSE], torch.ones(2, 3, dtype=acc), *target, IGNORE, list(Spec()))
        loss, again = ops.row_fused_(x, *target, None, IGNORE, list(Spec()), True, False)
        assert math.isnan(loss) and torch.equal(stats, again)


def test_no_class_takes_no_index(isa: str) -> None:
    for index in (0, -1):
        target = KernelTarget(torch.tensor([[IGNORE], [index], [IGNORE]]))
        with pytest.raises(IndexError, match="out of range"):
            fused_of(torch.zeros(3, 0), target, Spec())
