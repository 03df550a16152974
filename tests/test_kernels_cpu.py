# SPDX-License-Identifier: BSD-3-Clause
"""The compiled CPU kernels alone: row operations against the equation in float64, for every instruction set here.

Shapes are chosen for the kernels' branches: tails behind full vectors, blocks of 16384 classes, rows that threads
share, tiles of short rows and of planes, rows that start anywhere within a vector.
"""

from __future__ import annotations

import math

import pytest
import torch
from checks import threads
from kernel_truth import (
    DTYPES,
    IGNORE,
    INF,
    KINDS,
    Truth,
    assert_gradient,
    check,
    fused_of,
    isa,
    like,
    logits_for,
    rows_of,
    spec_for,
    stats_of,
    target_for,
    usable,
)

from softce import _library, ops
from softce.ops import KernelTarget, Spec

__all__ = ["isa"]  # the fixture


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tail(isa: str, dtype: torch.dtype, kind: str) -> None:
    """Every number of classes up to a few vectors, and those around a block and around the short rows' limit."""
    for classes in (*range(1, 18), 31, 32, 33, 65, 100, 257, 1000, *range(2047, 2067), 4097):
        x = logits_for((2, classes), dtype)
        mix = 0.1 * (classes % 2)
        check(x, target_for(kind, x), spec_for(kind, classes, mix_a=1 - mix, mix_b=mix / classes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_tiles(isa: str, dtype: torch.dtype, kind: str) -> None:
    """More than one tile of short rows, the last of them and its last block in part, around the changes of the way."""
    few = ((1100, 3), (1100, 10), (555, 16), (555, 20), (555, 40), (555, 63))
    for rows, classes in (*few, (555, 64), (345, 100), (345, 127), (345, 128), (100, 300), (40, 1000)):
        x = logits_for((rows, classes), dtype)
        check(x, target_for(kind, x), spec_for(kind, classes))
        check(x, target_for(kind, x), spec_for(kind, classes, mix_a=0.9, mix_b=0.1 / classes))
    x = logits_for((345, 50), dtype)
    if dtype != torch.float64:  # whose truth has not so many digits more
        x[40:50] += 300  # these rows have a reference of their own
    weighted = target_for(kind, x)._replace(weight=torch.rand(50, dtype=ops.acc_dtype(dtype)) + 0.2)
    check(x, weighted, spec_for(kind, 50, mix_a=0.9, mix_b=0.1 / 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_planes(isa: str, dtype: torch.dtype, kind: str) -> None:
    for shape in ((2, 5, 1), (2, 3, 7), (1, 21, 64), (2, 4, 700), (1, 300, 67), (1, 2100, 3), (1, 70, 1400)):
        x = logits_for(shape, dtype)
        check(x, target_for(kind, x), spec_for(kind, shape[1], mix_a=0.9, mix_b=0.1 / shape[1]))
        check(x, target_for(kind, x), spec_for(kind, shape[1]))


@pytest.mark.parametrize("kind", ["indices", "probs"])
def test_planes_in_tiles_apart(isa: str, kind: str) -> None:
    """Tiles too large to go together with the next one: many of them, and a part of one."""
    shape = (1, 150, 14100)
    x = logits_for(shape, torch.float32)
    check(x, target_for(kind, x), spec_for(kind, shape[1], mix_a=0.9, mix_b=0.1 / shape[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 10), (5, 3000), (2, 9, 50)], ids=str)
def test_options(isa: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    x, classes = logits_for(shape, dtype), shape[1]
    target = target_for(kind, x)
    weighted = target._replace(weight=torch.rand(classes, dtype=ops.acc_dtype(dtype)) + 0.2)
    row_weight = torch.rand(len(rows_of(x)), dtype=ops.acc_dtype(dtype))
    smooth = {"mix_a": 0.8, "mix_b": 0.2 / classes}
    check(x, target, spec_for(kind, classes, temperature=2.0, **smooth), row_weight=row_weight)
    check(x, weighted, spec_for(kind, classes, **smooth))
    check(x, weighted, spec_for(kind, classes), row_weight=row_weight)
    check(x, target, spec_for(kind, classes, softcap=5.0, z_loss=0.01), extras=True)
    check(x, weighted, spec_for(kind, classes, softcap=5.0, temperature=0.7, scale=2.0, **smooth))
    check(x, target, spec_for(kind, classes, z_loss=0.02, **smooth), row_weight=row_weight)


@pytest.mark.skipif("avx512_bf16" not in usable(), reason="this CPU or the library has no AVX-512 BF16")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(70, 10), (40, 100), (3, 3000), (2, 9, 50)], ids=str)
def test_the_processor_rounds_as_the_kernels_do(kind: str, shape: tuple[int, ...]) -> None:
    """The same bits with and without the bfloat16 instructions; of subnormal numbers they leave 0."""
    x = logits_for(shape, torch.bfloat16)
    target, spec = target_for(kind, x), spec_for(kind, shape[1])
    found = []
    before = _library.isa_chosen()
    try:
        for name in ("avx512", "avx512_bf16"):
            _library.isa_choose(name)
            assert _library.isa_chosen() == name
            for weight in (1.0, 1e-39):
                row_weight = torch.full((len(rows_of(x)),), weight)
                found.append(fused_of(x, target, spec, row_weight, mean=False)[1])
    finally:
        _library.isa_choose(before)
    software, small, hardware, none = found
    assert torch.equal(software.view(torch.int16), hardware.view(torch.int16)) and hardware.count_nonzero() > 0
    assert small.count_nonzero() > 0 and none.count_nonzero() == 0


@pytest.mark.parametrize("shape", [(70, 10), (7, 2500), (2, 9, 50)], ids=str)
@pytest.mark.parametrize(
    ("number", "parameter"),
    [
        (ops.PHI_FOCAL, 2.0),
        (ops.PHI_FOCAL, 0.5),
        (ops.PHI_LABEL_RELAXATION, 0.1),
        (ops.PHI_GENERALIZED, 0.7),
        (ops.PHI_POLY1, 1.5),
    ],
)
def test_row_transforms(isa: str, shape: tuple[int, ...], number: float, parameter: float) -> None:
    x = logits_for(shape, torch.float64)
    for kind in ("indices", "probs"):
        check(x, target_for(kind, x), spec_for(kind, shape[1], phi=number, phi_p0=parameter))
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        check(y, target_for("probs", y), spec_for("probs", shape[1], phi=number, phi_p0=parameter))


@pytest.mark.parametrize("number", [ops.PHI_FOCAL, ops.PHI_LABEL_RELAXATION, ops.PHI_GENERALIZED, ops.PHI_POLY1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [8, 3000])
def test_row_transforms_where_the_target_is_certain_or_impossible(
    isa: str, number: float, dtype: torch.dtype, classes: int
) -> None:
    x = torch.zeros(3, classes, dtype=dtype)
    x[0, 0], x[1, 0], x[2, 0] = 200.0, -200.0, 20.0
    target = KernelTarget(index=torch.zeros(3, 1, dtype=torch.int64))
    for parameter in (0.3, 0.9):
        loss, g, _ = fused_of(x, target, Spec(phi=number, phi_p0=parameter), mean=False)
        assert math.isfinite(loss) and bool(g.isfinite().all())
        assert float(g[0].abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("indices", "topk", "probs", "teacher"))
def test_a_row_shared_by_threads(isa: str, dtype: torch.dtype, kind: str) -> None:
    """Rows long enough to be cut in chunks, and one whose chunks differ by more than exp can span."""
    x = logits_for((3, 70001), dtype)
    x[1, 40000:] += 90
    x[2, :33000] = -INF if kind in ("indices", "teacher") else -50
    target = target_for(kind, x)
    if target.index is not None:
        target.index[2] = 69999
    with threads(2):
        check(x, target, spec_for(kind, 70001))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_starts(isa: str, dtype: torch.dtype) -> None:
    """Rows in a wider matrix, rows that are all the same memory, and starts anywhere within a vector."""
    for classes in (10, 33, 1000, 2500):
        for start in (0, 1, 3, 5):
            wide = logits_for((6, classes + 13), dtype)
            x = wide[:, start : start + classes]
            for kind in ("indices", "probs", "probs_acc"):
                check(x, target_for(kind, x), spec_for(kind, classes, mix_a=0.9, mix_b=0.1 / classes))
    x = logits_for((1, 300), dtype).expand(5, 300)
    check(x, target_for("topk", x), Spec())
    x = logits_for((3, 40, 70), dtype)[:, 2:33, 5:61]
    for kind in ("indices", "probs"):
        check(x, target_for(kind, x.contiguous()), spec_for(kind, 31, mix_a=0.9, mix_b=0.1 / 31))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(520, 4099), (2100, 1003), (30000, 71), (2, 33, 33000), (33, 66001)], ids=str)
def test_streamed_outputs(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Gradients large enough to be written past the caches, with row starts that no vector is aligned to."""
    shape = (shape[0] * 4 // dtype.itemsize, *shape[1:])
    x = logits_for(shape, dtype)
    for kind in ("indices", "probs", "teacher"):
        spec = spec_for(kind, shape[1], mix_a=0.9, mix_b=0.1 / shape[1])
        target = target_for(kind, x)
        _, g, _ = fused_of(x, target, spec, mean=False)
        over = x.clone()
        ops.row_fused_(over, *target, None, IGNORE, list(spec), False, False)
        assert torch.equal(g, over)  # in place is streamed, or not, by another rule
        few = torch.randint(0, len(x), (3,)) if x.dim() == 2 else torch.tensor([1])
        part = target._replace(
            index=None if target.index is None else target.index.view(len(x), -1)[few].view(-1, 1),
            dense=None if target.dense is None else target.dense[few],
        )
        truth = Truth(x[few], part, spec)
        _, want, push = truth.fused(None, False)
        assert_gradient(g[few], like(want, x[few]), "streamed", push)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_around_a_block(isa: str, dtype: torch.dtype, kind: str) -> None:
    """Rows that end a little before or behind a block, or a part of one whose sums are put away."""
    for classes in (2048 + 63, 4096 + 64, 16383, 16384, 16385, 16384 + 2048, 2 * 16384 + 65):
        x = logits_for((3, classes), dtype)
        check(x, target_for(kind, x), spec_for(kind, classes, mix_a=0.9, mix_b=0.1 / classes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, classes", [(24, 4099), (24, 20000), (24, 33000), (700, 71), (60, 1000)])
def test_rows_that_follow_one_another(
    isa: str, dtype: torch.dtype, in_place: bool, kind: str, rows: int, classes: int
) -> None:
    """A row is written while the next is read: rows of other scales, masked ones and nan do not touch neighbours."""
    x = logits_for((rows, classes), dtype)
    target, spec = target_for(kind, x), spec_for(kind, classes, mix_a=0.9)
    x[1] *= 60  # its reference is taken again, block after block
    x[3:5] += 300
    x[6:8] -= 40
    x[8] = -math.inf
    x[10, 7] = math.nan
    x[12, ::2] = -math.inf  # without weight
    dense, index = target.dense, target.index
    if dense is not None:
        dense[12, ::2] = -math.inf if kind == "teacher" else 0.0
        dense[14] += 200 if kind == "teacher" else 0
    else:
        assert index is not None
        index[12] = classes - 1 - classes % 2  # an odd one
        x[5, : classes * 2 // 3] = -math.inf
        index[5] = classes - 1
        index[[0, 2, 11, 13, rows - 1]] = IGNORE
        target = target._replace(rest=None)
    got = x.clone()
    if in_place:
        loss, _ = ops.row_fused_(got, *target, None, IGNORE, list(spec), False, False)
    else:
        loss, got, _ = fused_of(x, target, spec, mean=False)
    ignored = torch.zeros(rows, dtype=torch.bool) if index is None else (index == IGNORE).all(1)
    bad = torch.tensor([8, 10])
    if not ignored[bad].all():
        assert loss.isnan()
    assert got[bad][~ignored[bad]].isnan().all() and (got[ignored] == 0).all()
    fine = torch.tensor([r for r in range(rows) if r not in (8, 10)])
    part = KernelTarget(*(t if t is None else t[fine] for t in target))
    _, want, push = Truth(x[fine], part, spec).fused(None, False)
    assert_gradient(got[fine], like(want, x[fine]), "rows", push)


def placed(tensor: torch.Tensor, in_page: int) -> torch.Tensor:
    """A copy that begins `in_page` bytes behind the start of a page of 4096 bytes."""
    room = torch.empty(tensor.numel() * tensor.itemsize + 2 * 4096, dtype=torch.uint8)
    start = (in_page - room.data_ptr()) % 4096
    copy = room[start : start + tensor.numel() * tensor.itemsize].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [100, 700, 4096, 18432, 18433])
def test_places_in_a_page_do_not_change_a_bit(isa: str, dtype: torch.dtype, kind: str, classes: int) -> None:
    """How far the second sweep goes ahead of the first depends on where rows begin, what comes out does not."""
    x = logits_for((6, classes), dtype)
    target, spec = target_for(kind, x), spec_for(kind, classes, mix_a=0.9, mix_b=0.1 / classes)
    loss, want, _ = fused_of(x, target, spec, mean=False)
    check(x, target, spec)
    for of_logits, of_target in ((0, 0), (64, 64), (1088, 64), (2048, 3072), (3008, 2048), (4032, 1024)):
        moved = placed(x, of_logits)
        aim = target if target.dense is None else target._replace(dense=placed(target.dense, of_target))
        again, g, _ = fused_of(moved, aim, spec, mean=False)
        assert torch.equal(again, loss) and torch.equal(g, want)
        ops.row_fused_(moved, *aim, None, IGNORE, list(spec), False, False)
        assert torch.equal(moved, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 66001), (20, 4099), (2000, 37), (2, 21, 1900)], ids=str)
def test_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    x = logits_for(shape, dtype)
    target, spec = target_for(kind, x), spec_for(kind, shape[1], mix_a=0.9, mix_b=0.1 / shape[1])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append((*fused_of(x, target, spec), stats_of(x, target, spec)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probs"])
@pytest.mark.parametrize("shape", [(9000, 10), (900, 100), (600, 200)], ids=str)
def test_a_masked_class_changes_no_bit_of_other_rows(
    isa: str, dtype: torch.dtype, weighted: bool, kind: str, shape: tuple[int, ...]
) -> None:
    """Tiles of short rows begin without a thought of masks; from the first one that has some on they are cared for."""
    rows, classes = shape
    x = logits_for(shape, dtype)
    x[rows // 4, 3] = 5
    target = target_for(kind, x)
    if weighted:
        weight = torch.rand(classes, dtype=ops.acc_dtype(dtype)) + 0.5
        weight[3] = 0
        target = target._replace(weight=weight)
    if target.dense is not None:
        target.dense[rows // 4, 3] = 0
    spec = spec_for(kind, classes, mix_a=0.9, mix_b=0.1 / classes) if weighted else spec_for(kind, classes)
    _, want, stats = fused_of(x, target, spec, mean=False)
    x[rows // 4, 3] = -INF
    if target.index is not None:
        target.index[rows // 4] = 5
    masked_loss, found, masked_stats = fused_of(x, target, spec, mean=False)
    others = torch.arange(rows) != rows // 4
    assert math.isfinite(masked_loss) and not torch.equal(masked_stats, stats)
    assert torch.equal(found[others], want[others]) and torch.equal(masked_stats[:, others], stats[:, others])
    check(x, target, spec)
    for count in (2, 3):
        with threads(count):
            again = fused_of(x, target, spec, mean=False)
        assert all(torch.equal(a, b) for a, b in zip(again, (masked_loss, found, masked_stats), strict=True))


@pytest.mark.parametrize("classes", [100, 3000])
def test_bfloat16_gradients_are_rounded_to_nearest_even(isa: str, classes: int) -> None:
    """Where e is 0 the gradient is a product of two numbers, here one that float32 holds exactly: every significand,
    ties, next to powers of two, large numbers and those just normal."""
    x = torch.full((64, classes), -300.0, dtype=torch.bfloat16)
    x[:, 0] = 300
    significand = torch.arange(128, 256).repeat(classes // 128 + 1)[: classes - 1]
    ties = 0
    for exponent in (-126, -100, 0, 50, 53, 63, 64, 100, 110):
        dense = torch.zeros(64, classes, dtype=torch.bfloat16)
        dense[:, 1:] = significand.to(torch.bfloat16) * 2.0**-7
        dense[::4, 1:] *= -1
        dense[::2, 1::2] *= -1  # these rows' sums over the classes are small
        row_weight = (torch.arange(64) + 64.0) * 2.0 ** (exponent - 6)
        row_weight[1] = 2.0**exponent * (1 + 2.0**-15)
        _, g, _ = fused_of(x, KernelTarget(dense=dense), Spec(), row_weight, mean=False)
        exact = -(dense[:, 1:].double() * row_weight[:, None].double())
        assert torch.equal(exact, exact.float().double())
        want = exact.to(torch.bfloat16)
        ties += int((exact.float().view(torch.int32) % 65536 == 32768).sum())
        assert torch.equal(g[:, 1:].view(torch.int16), want.view(torch.int16)), f"2^{exponent}"
    assert ties > 100
