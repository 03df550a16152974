# SPDX-License-Identifier: BSD-3-Clause
# Functions under triton.jit are Triton's language, not Python: their values have no Python types.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"
"""The Triton kernels: one over the rows of the logits, and two tiny ones around it for the reduction.

``csrc/softce.h`` has the equation. With any reference r of a row near its maximum (so that nothing overflows or
cancels) and sums over the row's classes ::

    S = sum(exp(y - r)),  L = log S,  lse = r + L,  A = sum(q * (y - r)),  Q = sum(q)
    l = Q * L - A + z_loss * lse^2,   dL/dy = phi'(l) * ((Q + 2 * z_loss * lse) * exp(y - r) / S - q)

Where the row fits a block it is read once and r is its maximum. Where not, it is swept twice, the second time from L2
as long as the rows in flight fit there, with the first block's maximum as r: every sum is then a plain sum over lanes,
with one exp an element and no rescaling. A row whose later classes exceed that reference so far that S leaves the safe
range is swept again with its true maximum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_blocks import (
    COEF_B,
    EMPTY_ZERO,
    EXTRAS,
    FUSED,
    GRAD,
    LOOP,
    OPPOSED,
    PLANES,
    RESIDENT,
    SOFTCAP,
    STATS,
    TEACHER,
    UNIFORM,
    Scalars,
    addresses,
    entries_best,
    entry_totals,
    gather,
    load_tile,
    locate,
    readable,
)
from .triton_math import finite_or_zero, mul0, row_loss
from .triton_sums import block_sums, mend, see_rows, see_tile, weigh


class Rows(NamedTuple):
    """stats (4 or 7, R), lse (R,), coef (2 or 3, R), row_weight (R,), and float64 sums of some rows each.

    loss_parts (programs,) adds up to the loss before its factor, count_parts (parts,) to the mean's denominator.
    """

    stats: Any
    lse: Any
    coef: Any
    row_weight: Any
    loss_parts: Any
    count_parts: Any
    parts: Any  # at most COUNT_PARTS


class Mark(NamedTuple):
    """What makes up a tile's target weights besides the tile itself, each field (ROWS, 1)."""

    at: Any  # the class of a single entry, -1: none, or entries are not marked
    q: Any  # its effective weight
    every: Any  # what every class has
    rz: Any  # reference of the teacher's logits
    inv: Any  # 1 / their sum of exp


class Coefs(NamedTuple):
    """dL/dx = (exp(y - r) * (p + b * y) - d * q) * dy/dx, 0 where zero; p, b and d hold the factor 1 / temperature."""

    r: Any
    p: Any
    b: Any
    d: Any
    zero: Any


COUNT_PARTS = tl.constexpr(256)


@triton.jit
def widen(x, low):
    """Python floats arrive as float32; what a float64 has beyond that comes separately."""
    return tl.cast(x, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def widen_all(v, low):
    return Scalars(
        widen(v.x_scale, low.x_scale), widen(v.y_scale, low.y_scale), widen(v.slope, low.slope),
        widen(v.mix_a, low.mix_a), widen(v.mix_b, low.mix_b), widen(v.z_loss, low.z_loss),
        widen(v.phi_p0, low.phi_p0), widen(v.dense_scale, low.dense_scale), widen(v.scale, low.scale),
    )  # fmt: skip


@triton.jit
def divided(scale, rows, ZERO: tl.constexpr):
    """scale over the mean's denominator, in float64."""
    scale = tl.cast(scale, tl.float64)
    if rows.count_parts is not None:
        i = tl.arange(0, COUNT_PARTS)
        denominator = tl.sum(tl.load(rows.count_parts + i, mask=i < rows.parts, other=0.0), axis=0)
        if ZERO:
            return tl.where(denominator == 0, 0.0, scale / denominator)
        scale = scale / denominator
    return scale


@triton.jit
def row_number(place, sizes, i: tl.constexpr):
    """Offset of each row in row i of an (n, R) matrix."""
    return tl.cast(i, tl.int64) * sizes.batch * sizes.inner + place.row


@triton.jit
def save(stats, i: tl.constexpr, x, counted, place, sizes):
    tl.store(stats + row_number(place, sizes, i), tl.where(counted, x, 0.0), mask=place.here)


@triton.jit
def block_q(e, tile, c, mark, v, target, MARKED: tl.constexpr, FLAGS: tl.constexpr):
    """The effective target weights of a block, but for entries that are not marked; e as in Sums."""
    q = tl.zeros([1, 1], tile.y.dtype)
    if target.dense is not None:
        t = e * mark.inv if TEACHER & FLAGS else tile.t
        q = v.mix_a * t + v.mix_b
        if target.weight is not None:
            q *= tile.w
    else:
        if UNIFORM & FLAGS:
            q = mark.every if target.weight is None else mul0(tile.w, mark.every)
        if MARKED:
            q += tl.where(c == mark.at, mark.q, 0.0)
    return q


@triton.jit
def gradient(s, y, q, sech2, f, FLAGS: tl.constexpr):
    """dL/dx with s = exp(y - r)."""
    g = s * f.p - f.d * q
    if COEF_B & FLAGS:
        g += mul0(s * f.b, y)
    if SOFTCAP & FLAGS:
        g *= sech2
    return tl.where(f.zero, 0.0, g)


@triton.jit
def store(out, spot, c, g, ok, FLAGS: tl.constexpr):
    at = addresses(spot, c, out.class_stride, FLAGS)
    tl.store(at, g.to(out.data.dtype.element_ty), mask=ok, eviction_policy="evict_first")


@triton.jit
def sweep_gradient(logits, out, target, place, counted, f, mark, v, classes, MARKED: tl.constexpr, FLAGS: tl.constexpr,
                   ACC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Reads the rows (again) and writes their gradient."""
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK)[None, :]
        here, ok = readable(c, classes, counted, place, FLAGS)
        tile = load_tile(logits, target, place, c, here, ok, v, FLAGS, ACC, "evict_first")
        q = block_q(tl.exp(tile.t - mark.rz), tile, c, mark, v, target, MARKED, FLAGS)
        g = gradient(tl.exp(tile.y - f.r), tile.y, q, tile.sech2, f, FLAGS)
        store(out, place.out, c, g, (c < classes) & place.here, FLAGS)


@triton.jit
def finish(seen, en, whole, place, counted, target, rows, v, sizes, per_row, MODE: tl.constexpr, PHI: tl.constexpr,
           FLAGS: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """From a row's sums to its statistics (stored), its share of the loss, and the coefficients of its gradient."""
    DENSE: tl.constexpr = target.dense is not None
    x = seen.sums
    r = seen.r
    mass, dot = whole.mass, whole.dot
    dense_best = seen.dense_best
    shift = tl.log(x.s)
    lse = r + shift
    count = tl.full([1, 1], 1.0, ACC)
    if not DENSE and K == 1 and target.value is None:
        count = en.weight
    loss = mass * shift - dot + v.z_loss * lse * lse

    save(rows.stats, 0, loss, counted, place, sizes)
    save(rows.stats, 1, lse, counted, place, sizes)
    save(rows.stats, 2, mass, counted, place, sizes)
    save(rows.stats, 3, count, counted, place, sizes)
    if EXTRAS & FLAGS:
        if not DENSE:
            dense_best = entries_best(target, place, en, sizes, ACC, K)
        logp = whole.given_dot - whole.given * shift
        save(rows.stats, 4, logp, counted, place, sizes)
        save(rows.stats, 5, shift - x.h / x.s, counted, place, sizes)
        save(rows.stats, 6, tl.where(seen.best == dense_best, 1.0, 0.0), counted, place, sizes)

    share = tl.zeros([1, 1], ACC)
    f = Coefs(r, share, share, share, counted)
    if MODE == FUSED:
        value, slope = row_loss(loss, v.phi_p0, PHI)
        up = per_row
        share = tl.where(counted, value, 0.0)
        if rows.row_weight is not None:
            row_weight = tl.load(rows.row_weight + place.row, mask=place.here, other=0.0)
            share *= row_weight
            up *= row_weight
        up = up * slope * v.slope
        f = Coefs(r, up * (mass + 2.0 * v.z_loss * lse) / x.s, share, up, (counted == 0) | (up == 0))
    return f, share


@triton.jit
def given_coefs(rows, place, counted, v, sizes, FLAGS: tl.constexpr):
    r = tl.load(rows.lse + place.row, mask=place.here, other=0.0)
    p = tl.load(rows.coef + row_number(place, sizes, 0), mask=place.here, other=0.0)
    d = tl.load(rows.coef + row_number(place, sizes, 1), mask=place.here, other=0.0)
    b = tl.zeros_like(p)
    if COEF_B & FLAGS:
        b = tl.load(rows.coef + row_number(place, sizes, 2), mask=place.here, other=0.0)
    return Coefs(r, p * v.slope, b * v.slope, d * v.slope, (counted == 0) | ((p == 0) & (d == 0) & (b == 0)))


@triton.jit
def row_tile(i, logits, out, target, rows, v, per_row, sizes, MODE: tl.constexpr, PHI: tl.constexpr,
             FLAGS: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """Tile number i from its reads to its writes. Gives its rows' shares of the loss, (ROWS, 1)."""
    DENSE: tl.constexpr = target.dense is not None
    WEIGHTED: tl.constexpr = target.weight is not None
    TEACH: tl.constexpr = (TEACHER & FLAGS) != 0
    SEES: tl.constexpr = MODE != GRAD or TEACH
    HELD: tl.constexpr = SEES and (RESIDENT & FLAGS) != 0
    # A single entry of many short rows is compared with every class; else entries are written over the tile: for a long
    # row the classes to compare with would take as many registers as the row itself.
    MARKED: tl.constexpr = (K == 1) and (ROWS > 1)
    none = tl.zeros([1, 1], ACC)
    place = locate(i, logits, out, target, sizes, FLAGS, ROWS)
    counted = place.here
    every = none + v.mix_b
    at = tl.full([1, 1], -1, tl.int32)
    q = none
    en = none
    if not DENSE:
        en = gather(logits, target, place, v, sizes, FLAGS, ACC, K)
        counted = en.counted
        if target.rest is not None:
            every += v.mix_a * tl.load(target.rest + place.row, mask=place.here, other=0.0)
        if MARKED:
            at = tl.where(en.ok, en.index, -1)
            q = en.weight * (v.mix_a * en.value)

    c = tl.arange(0, BLOCK)[None, :]
    rz = none
    inv = none
    if HELD:
        here, ok = readable(c, sizes.classes, counted, place, FLAGS)
        tile = load_tile(logits, target, place, c, here, ok, v, FLAGS, ACC, "evict_first")
        r = finite_or_zero(tl.max(tile.y, axis=1, keep_dims=True))
        if TEACH:
            rz = finite_or_zero(tl.max(tile.t, axis=1, keep_dims=True))
        lanes = block_sums(tile, ok, r, rz, v, DENSE, WEIGHTED, MODE, FLAGS)
        seen = see_tile(tile, lanes, c, ok, r, rz, DENSE, MODE, FLAGS)
    elif SEES:
        seen = see_rows(logits, target, place, counted, v, sizes.classes, MODE, FLAGS, ACC, ROWS, BLOCK, STAGES)
        rz = seen.rz
    if TEACH:
        inv = 1.0 / seen.sums.e
    mark = Mark(at, q, every, rz, inv)

    share = none
    if MODE == GRAD:
        f = given_coefs(rows, place, counted, v, sizes, FLAGS)
    else:
        whole = weigh(seen, en, mark, place, target, v, sizes, (EXTRAS & FLAGS) != 0, FLAGS)
        if OPPOSED & FLAGS:
            whole = mend(
                whole, seen, mark, logits, target, place, counted, v, sizes, (EXTRAS & FLAGS) != 0, FLAGS, ACC, ROWS,
                BLOCK,
            )  # fmt: skip
        f, share = finish(seen, en, whole, place, counted, target, rows, v, sizes, per_row, MODE, PHI, FLAGS, ACC, K)

    if MODE != STATS:
        # In place, a thread's gradient must not come before another's last look at the row.
        tl.debug_barrier()
        if HELD and MODE == FUSED:
            q = block_q(lanes.e, tile, c, mark, v, target, MARKED, FLAGS)
            g = gradient(lanes.s, tile.y, q, tile.sech2, f, FLAGS)
            store(out, place.out, c, g, (c < sizes.classes) & place.here, FLAGS)
        else:
            sweep_gradient(
                logits, out, target, place, counted, f, mark, v, sizes.classes, MARKED, FLAGS, ACC, BLOCK, STAGES
            )
        if not (DENSE or MARKED):
            # Equal classes add up and write the same value. The other threads' stores of this row come first.
            total = entry_totals(target, place, en, sizes, ACC) if K > 1 else en.value
            tl.debug_barrier()
            q = mul0(en.weight, v.mix_a * total + every)
            g = gradient(tl.exp(en.y - f.r), en.y, q, en.sech2, f, FLAGS)
            store(out, place.out, en.index, g, en.ok, FLAGS)
    return share


@triton.jit
def row_kernel(logits, out, target, rows, scalars, low, sizes, MODE: tl.constexpr, PHI: tl.constexpr,
               FLAGS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """Row statistics, row gradients, or both: csrc/softce.h: launch_row_stats, launch_row_grad, launch_row_fused.

    One tile a program or, with LOOP, the tiles i, i + programs, .. for program i: which rows a program adds up depends
    on nothing else. A loop keeps what does not change in registers, so it is there only where it limits the rows in
    flight. K is a power of two that holds the entries of a row; low is what float32 scalars lost, or None.
    """
    ACC: tl.constexpr = tl.float32 if low is None else tl.float64
    v = scalars if low is None else widen_all(scalars, low)
    per_row = (tl.zeros([1, 1], ACC) + divided(v.scale, rows, (EMPTY_ZERO & FLAGS) != 0)).to(ACC)
    shares = tl.zeros([ROWS, 1], tl.float64)
    if LOOP & FLAGS:
        tiles = tl.cdiv(sizes.batch, ROWS)
        if PLANES & FLAGS:
            tiles = sizes.batch * tl.cdiv(sizes.inner, ROWS)
        for i in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            shares += row_tile(
                i, logits, out, target, rows, v, per_row, sizes, MODE, PHI, FLAGS, ACC, K, ROWS, BLOCK, STAGES
            ).to(tl.float64)
    else:
        i = tl.program_id(0)
        shares += row_tile(
            i, logits, out, target, rows, v, per_row, sizes, MODE, PHI, FLAGS, ACC, K, ROWS, BLOCK, STAGES
        ).to(tl.float64)
    if MODE == FUSED:
        tl.store(rows.loss_parts + tl.program_id(0), tl.sum(tl.sum(shares, axis=1), axis=0))


@triton.jit
def count_kernel(target, rows, sizes, DENSE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """count_parts: program i of so many adds up what the tiles i, i + programs, .. of ROWS rows count."""
    count_sum = tl.zeros([ROWS, 1], tl.float64)
    total = tl.cast(sizes.batch, tl.int64) * sizes.inner
    for i in tl.range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        row = tl.cast(i, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        here = row < total
        count = tl.where(here, 1.0, 0.0)
        if not DENSE:
            k = tl.arange(0, K)[None, :]
            index = tl.load(target.index + row * sizes.entries + k, mask=here & (k < sizes.entries), other=0)
            used = here & (k < sizes.entries) & (index != sizes.ignore_index)
            count = tl.max(tl.where(used, 1.0, 0.0), axis=1, keep_dims=True)
            if K == 1 and target.value is None and target.weight is not None:
                ok = used & (index >= 0) & (index < sizes.classes)
                count = tl.load(target.weight + index, mask=ok, other=0.0)
        if rows.row_weight is not None:
            row_weight = tl.load(rows.row_weight + row, mask=here, other=0.0)
            count = tl.where(count == 0, 0.0, count * row_weight)
        count_sum += count.to(tl.float64)
    tl.store(rows.count_parts + tl.program_id(0), tl.sum(tl.sum(count_sum, axis=1), axis=0))


@triton.jit
def loss_kernel(loss, rows, scalars, low, parts, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    """loss = scale * sum(loss_parts) / denominator, by one program, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, parts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(rows.loss_parts + i, mask=i < parts, other=0.0)
    scale = scalars.scale if low is None else widen(scalars.scale, low.scale)
    value = tl.sum(total, axis=0) * divided(scale, rows, ZERO)
    tl.store(loss, value.to(loss.dtype.element_ty))
