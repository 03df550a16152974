# SPDX-License-Identifier: BSD-3-Clause
"""What the Triton row kernel is made of: its arguments, the loading of a tile, the sums over a row's classes.

A tile is ROWS rows by BLOCK classes (or K entries). Per-row values are (ROWS, 1), so that they meet a tile without
ceremony. The NamedTuples are arguments or results of the functions here; a field that is None, and a (1, 1) zero that
stands for a quantity a variant does not need, vanish at compile time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_math import finite_or_zero, mul0, tanh_sech2


class Block(NamedTuple):
    """Element (b, c, s) at data + b * batch_stride + c * class_stride + s, as csrc/softce.h: Block."""

    data: Any
    batch_stride: Any
    class_stride: Any


class Target(NamedTuple):
    """csrc/softce.h: Target. index (R, K), value (R, K), rest (R,), dense a Block, weight (C,)."""

    index: Any
    value: Any
    rest: Any
    dense: Any
    weight: Any


class Sizes(NamedTuple):
    batch: Any
    classes: Any
    inner: Any
    entries: Any
    ignore_index: Any


class Scalars(NamedTuple):
    """The scalars of a call, in the form in which the kernel multiplies with them."""

    x_scale: Any  # 1 / temperature, or 1 / softcap where there is one
    y_scale: Any  # softcap / temperature
    slope: Any  # 1 / temperature
    mix_a: Any
    mix_b: Any
    z_loss: Any
    phi_p0: Any
    dense_scale: Any  # 1 / dense_temperature
    scale: Any


class Place(NamedTuple):
    """Where a tile of rows lies, each field (ROWS, 1)."""

    row: Any  # row number
    here: Any  # bool: there is such a row
    logits: Any  # offset of its class 0, and so on
    out: Any
    dense: Any


class Tile(NamedTuple):
    """A block of classes: y, dy/dx without its factor 1 / temperature, dense target, class weights if there are any."""

    y: Any
    sech2: Any
    t: Any
    w: Any


class Entries(NamedTuple):
    """The sparse entries of a tile, (ROWS, K); counted and wrong are (ROWS, 1)."""

    ok: Any  # bool: an entry, neither padding nor out of range
    index: Any  # its class; 0 where not ok
    value: Any
    weight: Any  # class weight
    y: Any
    sech2: Any
    counted: Any  # bool: the row is not ignored
    wrong: Any  # bool: an index is out of range


class Sums(NamedTuple):
    """Sums over classes, with d = y - r."""

    s: Any  # exp(d)
    qd: Any  # u * d, with u = q for probabilities, else w
    q: Any  # u, unless u = 1
    e: Any  # e = exp(z - rz) of teacher logits z
    ed: Any  # w * e * d
    ew: Any  # w * e, unless w = 1
    h: Any  # exp(d) * d
    gd: Any  # g * d, with g = t for probabilities, e for a teacher, else 1
    g: Any  # t for probabilities


class Best(NamedTuple):
    """The largest value of each lane and its first class."""

    value: Any
    at: Any


# MODE
STATS = tl.constexpr(0)
GRAD = tl.constexpr(1)
FUSED = tl.constexpr(2)

# FLAGS. Written `FLAG & FLAGS`: in the interpreter only the left-hand side is a constexpr.
EXTRAS = tl.constexpr(1)
SOFTCAP = tl.constexpr(2)
TEACHER = tl.constexpr(4)  # dense holds teacher logits
UNIFORM = tl.constexpr(8)  # every class has some target weight besides the entries: smoothing or rest
PLANES = tl.constexpr(16)  # (B, C, S) with S contiguous; else (R, C) with C contiguous
WIDE = tl.constexpr(32)  # class offsets exceed 31 bits
RESIDENT = tl.constexpr(64)  # BLOCK >= C: the row stays on chip
COEF_B = tl.constexpr(128)  # coef has a third row
EMPTY_ZERO = tl.constexpr(256)  # a mean over a denominator of 0 is 0

TOO_LARGE = tl.constexpr(1e20)
TOO_SMALL = tl.constexpr(1e-20)


@triton.jit
def offsets(base, c, class_stride, FLAGS: tl.constexpr):
    if (PLANES & FLAGS) == 0:
        return base + c
    if WIDE & FLAGS:
        return base + c.to(tl.int64) * class_stride
    return base + c * class_stride


@triton.jit
def load_y(logits, base, c, ok, v, FLAGS: tl.constexpr, ACC: tl.constexpr, EVICT: tl.constexpr):
    """y, -inf where not ok, and dy/dx without its factor 1 / temperature."""
    at = logits.data + offsets(base, c, logits.class_stride, FLAGS)
    y = tl.load(at, mask=ok, other=float("-inf"), eviction_policy=EVICT).to(ACC) * v.x_scale
    sech2 = tl.zeros([1, 1], ACC)
    if SOFTCAP & FLAGS:
        y, sech2 = tanh_sech2(y)
        y = tl.where(ok, y * v.y_scale, float("-inf"))
    return y, sech2


@triton.jit
def load_t(target, base, c, ok, v, FLAGS: tl.constexpr, ACC: tl.constexpr, EVICT: tl.constexpr):
    """A dense target's values; teacher logits are divided by their temperature. 0 without a dense target."""
    t = tl.zeros([1, 1], ACC)
    if target.dense is not None:
        at = target.dense.data + offsets(base, c, target.dense.class_stride, FLAGS)
        if TEACHER & FLAGS:
            t = tl.load(at, mask=ok, other=float("-inf"), eviction_policy=EVICT).to(ACC) * v.dense_scale
        else:
            t = tl.load(at, mask=ok, other=0.0, eviction_policy=EVICT).to(ACC)
    return t


@triton.jit
def load_tile(logits, target, place, c, ok, v, FLAGS: tl.constexpr, ACC: tl.constexpr, EVICT: tl.constexpr):
    y, sech2 = load_y(logits, place.logits, c, ok, v, FLAGS, ACC, EVICT)
    t = load_t(target, place.dense, c, ok, v, FLAGS, ACC, EVICT)
    w = tl.full([1, 1], 1.0, ACC)
    if target.weight is not None:
        w = tl.load(target.weight + tl.broadcast_to(c, ok.shape), mask=ok, other=0.0)
    return Tile(y, sech2, t, w)


@triton.jit
def locate(tile, logits, out, target, sizes, FLAGS: tl.constexpr, ROWS: tl.constexpr):
    tile = tl.cast(tile, tl.int64)
    i = tl.arange(0, ROWS)[:, None]
    if PLANES & FLAGS:
        tiles = tl.cdiv(sizes.inner, ROWS)
        b = tile // tiles
        s = tile % tiles * ROWS + i
        here = s < sizes.inner
        row = b * sizes.inner + s
    else:
        b = tile * ROWS + i
        s = tl.zeros([1, 1], tl.int64)
        here = b < sizes.batch
        row = b
    at_out = s
    at_dense = s
    if out is not None:
        at_out = b * out.batch_stride + s
    if target.dense is not None:
        at_dense = b * target.dense.batch_stride + s
    return Place(row, here, b * logits.batch_stride + s, at_out, at_dense)


@triton.jit
def load_value(target, at, used, ACC: tl.constexpr):
    """The values of entries, 0 where not used."""
    value = tl.where(used, 1.0, 0.0).to(ACC)
    if target.value is not None:
        value = tl.load(target.value + at, mask=used, other=0.0)
    return value


@triton.jit
def gather(logits, target, place, v, sizes, FLAGS: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr):
    """The entries of each row. Nothing is read at an index out of range: torch's device assertion is a NaN here."""
    k = tl.arange(0, K)[None, :]
    at = place.row * sizes.entries + k
    given = (k < sizes.entries) & place.here
    index = tl.load(target.index + at, mask=given, other=0)
    used = given & (index != sizes.ignore_index)
    ok = used & (index >= 0) & (index < sizes.classes)
    tl.device_assert(ok | (used == 0), "softce: target out of range")
    index = tl.where(ok, index, 0)
    weight = tl.full([1, 1], 1.0, ACC)
    if target.weight is not None:
        weight = tl.load(target.weight + index, mask=ok, other=0.0)
    y, sech2 = load_y(logits, place.logits, index, ok, v, FLAGS, ACC, "evict_last")
    counted = tl.max(used.to(tl.int32), axis=1, keep_dims=True) > 0
    wrong = tl.max((used & (ok == 0)).to(tl.int32), axis=1, keep_dims=True) > 0
    return Entries(ok, index, load_value(target, at, used, ACC), weight, y, sech2, counted, wrong)


@triton.jit
def entry_totals(target, place, en, sizes, ACC: tl.constexpr):
    """(ROWS, K): the summed value of each entry's class, over all of the row's entries of that class."""
    total = tl.zeros_like(en.value)
    for j in range(sizes.entries):
        at = place.row * sizes.entries + j
        index = tl.load(target.index + at, mask=place.here, other=0)
        used = place.here & (index != sizes.ignore_index)
        total += tl.where(index == en.index, load_value(target, at, used, ACC), 0.0)
    return total


@triton.jit
def entries_best(target, place, en, sizes, ACC: tl.constexpr, K: tl.constexpr):
    """(ROWS, 1): the class with the largest summed value, the smallest one on a tie."""
    total = entry_totals(target, place, en, sizes, ACC)
    total = tl.where(tl.arange(0, K)[None, :] < sizes.entries, total, float("-inf"))
    first = tl.where(total == tl.max(total, axis=1, keep_dims=True), en.index, 2147483647)
    return tl.min(first, axis=1, keep_dims=True)


@triton.jit
def block_sums(x, ok, r, rz, v, DENSE: tl.constexpr, WEIGHTED: tl.constexpr, MODE: tl.constexpr, FLAGS: tl.constexpr):
    """What one block of classes adds to the sums, lane by lane."""
    none = tl.zeros([1, 1], r.dtype)
    s, qd, q, e, ed, ew, h, gd, g = none, none, none, none, none, none, none, none, none
    if DENSE and (TEACHER & FLAGS):
        e = tl.exp(x.t - rz)
    if MODE != GRAD:
        d = x.y - r
        s = tl.exp(d)
        if DENSE and (TEACHER & FLAGS):
            ed = mul0(e, d)
            if WEIGHTED:
                ew = x.w * e
                ed = mul0(ew, d)
        if DENSE and not (TEACHER & FLAGS):
            q = tl.where(ok, x.w * (v.mix_a * x.t + v.mix_b), 0.0)
            qd = mul0(q, d)
        elif UNIFORM & FLAGS:
            qd = tl.where(ok, d, 0.0)
            if WEIGHTED:
                q = x.w
                qd = mul0(q, d)
        if EXTRAS & FLAGS:
            h = mul0(s, d)
            if not DENSE:
                gd = tl.where(ok, d, 0.0)
            elif TEACHER & FLAGS:
                gd = mul0(e, d)
            else:
                g = x.t
                gd = mul0(g, d)
    return Sums(s, qd, q, e, ed, ew, h, gd, g)


@triton.jit
def row_sum(x):
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def row_sums(x):
    return Sums(
        row_sum(x.s), row_sum(x.qd), row_sum(x.q), row_sum(x.e), row_sum(x.ed), row_sum(x.ew), row_sum(x.h),
        row_sum(x.gd), row_sum(x.g),
    )  # fmt: skip


@triton.jit
def better(best, y, c, ok):
    """NaN counts as the largest value, as it does in torch."""
    y = tl.where(y == y, y, float("inf"))
    y = tl.where(ok, y, float("-inf"))
    return Best(tl.maximum(best.value, y), tl.where(y > best.value, c, best.at))


@triton.jit
def first_best(best):
    first = tl.where(best.value == tl.max(best.value, axis=1, keep_dims=True), best.at, 2147483647)
    return tl.min(first, axis=1, keep_dims=True)


@triton.jit
def sweep(logits, target, place, live, r, rz, v, classes, MODE: tl.constexpr, FLAGS: tl.constexpr, ACC: tl.constexpr,
          ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The sums of rows that no block holds, and where they are wanted the argmax of logits and dense target."""
    DENSE: tl.constexpr = target.dense is not None
    WEIGHTED: tl.constexpr = target.weight is not None
    MORE: tl.constexpr = (MODE != GRAD) and (EXTRAS & FLAGS)
    lanes = tl.zeros([ROWS, BLOCK], ACC)
    # The sums of a block of zeros have the shapes that this variant needs.
    x = block_sums(Tile(lanes, lanes, lanes, lanes), lanes != 0, lanes, lanes, v, DENSE, WEIGHTED, MODE, FLAGS)
    acc = Sums(tl.zeros_like(x.s), tl.zeros_like(x.qd), tl.zeros_like(x.q), tl.zeros_like(x.e), tl.zeros_like(x.ed),
               tl.zeros_like(x.ew), tl.zeros_like(x.h), tl.zeros_like(x.gd), tl.zeros_like(x.g))  # fmt: skip
    if not MORE:
        lanes = tl.zeros([1, 1], ACC)
    best = Best(lanes - float("inf"), lanes.to(tl.int32))
    dense_best = best
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK)[None, :]
        ok = (c < classes) & live
        tile = load_tile(logits, target, place, c, ok, v, FLAGS, ACC, "evict_last")
        x = block_sums(tile, ok, r, rz, v, DENSE, WEIGHTED, MODE, FLAGS)
        acc = Sums(acc.s + x.s, acc.qd + x.qd, acc.q + x.q, acc.e + x.e, acc.ed + x.ed, acc.ew + x.ew, acc.h + x.h,
                   acc.gd + x.gd, acc.g + x.g)  # fmt: skip
        if MORE:
            best = better(best, tile.y, c, ok)
            if DENSE:
                dense_best = better(dense_best, tile.t, c, ok)
    return row_sums(acc), first_best(best), first_best(dense_best)


@triton.jit
def top(logits, target, place, live, v, end, DENSE: tl.constexpr, FLAGS: tl.constexpr, ACC: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(ROWS, 1): the maximum before class end of y, or of the dense target; 0 instead of -inf."""
    lanes = tl.full([ROWS, BLOCK], float("-inf"), ACC)
    for start in tl.range(0, end, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        ok = (c < end) & live
        if DENSE:
            lanes = tl.maximum(lanes, load_t(target, place.dense, c, ok, v, FLAGS, ACC, "evict_last"))
        else:
            y, _ = load_y(logits, place.logits, c, ok, v, FLAGS, ACC, "evict_last")
            lanes = tl.maximum(lanes, y)
    return finite_or_zero(tl.max(lanes, axis=1, keep_dims=True))
