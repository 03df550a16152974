# SPDX-License-Identifier: BSD-3-Clause
# Functions under triton.jit are Triton's language, not Python: their values have no Python types.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"
"""The sums over a row's classes: of a tile that holds its rows, or by sweeps over rows that no block holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_blocks import EXTRAS, GRAD, TEACHER, UNIFORM, Tile, entry_of, load_t, load_tile, load_y, readable
from .triton_math import finite_or_zero, mul0


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


class Seen(NamedTuple):
    """What is known of a tile's rows once their classes were seen, each field (ROWS, 1) or a Sums of such."""

    sums: Any
    r: Any  # the reference of y, and of a teacher's logits
    rz: Any
    best: Any  # first argmax of y, and of a dense target
    dense_best: Any


class Weighed(NamedTuple):
    """Q, sum(q * (y - r)), and of the target as given, before smoothing and class weights; each field (ROWS, 1)."""

    mass: Any
    dot: Any
    given: Any
    given_dot: Any


TOO_LARGE = tl.constexpr(1e20)
TOO_SMALL = tl.constexpr(1e-20)


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
        here, ok = readable(c, classes, live, place, FLAGS)
        tile = load_tile(logits, target, place, c, here, ok, v, FLAGS, ACC, "evict_last")
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
        here, ok = readable(c, end, live, place, FLAGS)
        if DENSE:
            lanes = tl.maximum(lanes, load_t(target, place.dense, c, here, v, FLAGS, ACC, "evict_last"))
        else:
            y, _ = load_y(logits, place.logits, c, here, ok, v, FLAGS, ACC, "evict_last")
            lanes = tl.maximum(lanes, y)
    return finite_or_zero(tl.max(lanes, axis=1, keep_dims=True))


@triton.jit
def see_tile(tile, lanes, c, ok, r, rz, DENSE: tl.constexpr, MODE: tl.constexpr, FLAGS: tl.constexpr):
    """Of rows that the tile holds; lanes are its block_sums."""
    best = tl.zeros([1, 1], tl.int32)
    dense_best = best
    if MODE != GRAD and (EXTRAS & FLAGS):
        start = Best(tl.full([1, 1], float("-inf"), r.dtype), best)
        best = first_best(better(start, tile.y, c, ok))
        if DENSE:
            dense_best = first_best(better(start, tile.t, c, ok))
    return Seen(row_sums(lanes), r, rz, best, dense_best)


@triton.jit
def unsafe(s, counted):
    """(ROWS, 1): the reference was too far off."""
    return counted & ((s > TOO_LARGE) | (s < TOO_SMALL))


@triton.jit
def see_rows(logits, target, place, counted, v, classes, MODE: tl.constexpr, FLAGS: tl.constexpr, ACC: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Of rows that no block holds: a sweep with the first block's maxima, and another where they do not serve."""
    TEACH: tl.constexpr = (TEACHER & FLAGS) != 0
    LOGITS: tl.constexpr = MODE != GRAD
    r = tl.zeros([ROWS, 1], ACC)
    rz = r
    first = tl.minimum(classes, BLOCK)
    if LOGITS:
        r = top(logits, target, place, counted, v, first, False, FLAGS, ACC, ROWS, BLOCK)
    if TEACH:
        rz = top(logits, target, place, counted, v, first, True, FLAGS, ACC, ROWS, BLOCK)
    x, best, dense_best = sweep(
        logits, target, place, counted, r, rz, v, classes, MODE, FLAGS, ACC, ROWS, BLOCK, STAGES
    )
    again = tl.zeros([ROWS, 1], tl.int1)
    if LOGITS:
        again |= unsafe(x.s, counted)
    if TEACH:
        again |= unsafe(x.e, counted)
    if tl.max(tl.max(again.to(tl.int32), axis=1), axis=0) > 0:
        if LOGITS:
            r = top(logits, target, place, counted, v, classes, False, FLAGS, ACC, ROWS, BLOCK)
        if TEACH:
            rz = top(logits, target, place, counted, v, classes, True, FLAGS, ACC, ROWS, BLOCK)
        x, best, dense_best = sweep(
            logits, target, place, counted, r, rz, v, classes, MODE, FLAGS, ACC, ROWS, BLOCK, STAGES
        )
    return Seen(x, r, rz, best, dense_best)


@triton.jit
def dot_by_class(logits, target, place, counted, r, rz, inv, v, sizes, WHOLE: tl.constexpr, FLAGS: tl.constexpr,
                 ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(ROWS, 1): sum(q * (y - r)) of a sparse target or a teacher, every q put together before it is multiplied.

    Terms of one class that differ in sign would be infinities of both signs where y is -inf. Without WHOLE, the same
    of the target as given, before smoothing and class weights.
    """
    DENSE: tl.constexpr = target.dense is not None
    lanes = tl.zeros([ROWS, BLOCK], ACC)
    for start in tl.range(0, sizes.classes, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        here, ok = readable(c, sizes.classes, counted, place, FLAGS)
        tile = load_tile(logits, target, place, c, here, ok, v, FLAGS, ACC, "evict_last")
        t = tl.zeros_like(lanes)
        if DENSE:
            t += tl.exp(tile.t - rz) * inv
        else:
            if target.rest is not None:
                t += tl.load(target.rest + place.row, mask=place.here, other=0.0)
            for j in range(sizes.entries):
                index, value = entry_of(target, place, j, sizes, ACC)
                t += tl.where(index == c, value, 0.0)
        q = (v.mix_a * t + v.mix_b) * tile.w if WHOLE else t
        lanes += tl.where(ok, mul0(q, tile.y - r), 0.0)
    return row_sum(lanes)


@triton.jit
def weigh(seen, en, mark, place, target, v, sizes, MORE: tl.constexpr, FLAGS: tl.constexpr):
    """The row's target weights, from sums; with MORE also the target as given."""
    x = seen.sums
    none = tl.zeros_like(x.s)
    weights = x.q if target.weight is not None else none + sizes.classes  # of all classes
    given, given_dot = none, none
    if target.dense is not None:
        mass, dot = x.q, x.qd
        if TEACHER & FLAGS:
            mass = v.mix_a * (none + 1.0 if target.weight is None else x.ew * mark.inv)
            dot = v.mix_a * x.ed * mark.inv
            if UNIFORM & FLAGS:
                mass, dot = mass + v.mix_b * weights, dot + mul0(v.mix_b, x.qd)
        if MORE:
            given, given_dot = (none + 1.0, x.gd * mark.inv) if TEACHER & FLAGS else (x.g, x.gd)
    else:
        q = en.weight * (v.mix_a * en.value)
        mass, dot = row_sum(q), row_sum(mul0(q, en.y - seen.r))
        if UNIFORM & FLAGS:
            mass, dot = mass + mark.every * weights, dot + mul0(mark.every, x.qd)
        mass = tl.where(en.wrong, float("nan"), mass)
        if MORE:
            given, given_dot = row_sum(en.value), row_sum(mul0(en.value, en.y - seen.r))
            if target.rest is not None:
                rest = tl.load(target.rest + place.row, mask=place.here, other=0.0)
                given, given_dot = given + rest * sizes.classes, given_dot + mul0(rest, x.gd)
    return Weighed(mass, dot, given, given_dot)


@triton.jit
def lost(dot, seen, counted):
    """(ROWS, 1): infinities of both signs met in dot; nothing in the logits themselves makes it NaN."""
    return counted & (dot != dot) & (seen.sums.s > 0)


@triton.jit
def mend(whole, seen, mark, logits, target, place, counted, v, sizes, MORE: tl.constexpr, FLAGS: tl.constexpr,
         ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Another sweep where terms of different signs met a logit of -inf, which is rare.

    It takes few classes at a time: the row may be held in registers meanwhile.
    """
    FEW: tl.constexpr = BLOCK if ROWS * BLOCK <= 256 else (256 // ROWS if ROWS < 256 else 1)
    mass, dot, given, given_dot = whole.mass, whole.dot, whole.given, whole.given_dot
    again = lost(dot, seen, counted)
    if tl.max(tl.max(again.to(tl.int32), axis=1), axis=0) > 0:
        exact = dot_by_class(
            logits, target, place, counted, seen.r, seen.rz, mark.inv, v, sizes, True, FLAGS, ACC, ROWS, FEW
        )
        dot = tl.where(again, exact, dot)
    if MORE:
        again = lost(given_dot, seen, counted)
        if tl.max(tl.max(again.to(tl.int32), axis=1), axis=0) > 0:
            exact = dot_by_class(
                logits, target, place, counted, seen.r, seen.rz, mark.inv, v, sizes, False, FLAGS, ACC, ROWS, FEW
            )
            given_dot = tl.where(again, exact, given_dot)
    return Weighed(mass, dot, given, given_dot)
