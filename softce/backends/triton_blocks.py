# SPDX-License-Identifier: BSD-3-Clause
# Functions under triton.jit are Triton's language, not Python: their values have no Python types.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call,untyped-decorator"
"""The Triton row kernel's arguments, and the loading of a tile and of sparse entries.

A tile is ROWS rows by BLOCK classes (or K entries). Per-row values are (ROWS, 1), so that they meet a tile without
ceremony. The NamedTuples are arguments or results of the functions here; a field that is None, and a (1, 1) zero that
stands for a quantity a variant does not need, vanish at compile time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_math import tanh_sech2


class Block(NamedTuple):
    """Element (b, c, s) at data + b * batch_stride + c * class_stride + s, as csrc/softce.h: Block."""

    data: Any
    batch_stride: Any
    class_stride: Any


class Target(NamedTuple):
    """csrc/softce.h: Target. index (R, K), value (R, K), rest (R,), weight (C,), and the fields of a Block: dense.

    They are not a Block: inside loops Triton 3.6 loses what is constant, a stride of 1 say, in a tuple within a tuple.
    """

    index: Any
    value: Any
    rest: Any
    dense: Any
    dense_batch_stride: Any
    dense_class_stride: Any
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


class Spot(NamedTuple):
    """Where the class 0 of a tile's rows lies: base + shift, so that only one address is wide."""

    base: Any  # pointer, one a tile
    shift: Any  # (ROWS, 1)


class Place(NamedTuple):
    """A tile of rows: row and here are (ROWS, 1), the others a Spot each."""

    row: Any  # row number
    here: Any  # bool: there is such a row
    logits: Any
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
WIDE = tl.constexpr(32)  # offsets within a tile exceed 31 bits
RESIDENT = tl.constexpr(64)  # BLOCK >= C: the row stays on chip
COEF_B = tl.constexpr(128)  # coef has a third row
EMPTY_ZERO = tl.constexpr(256)  # a mean over a denominator of 0 is 0
LOOP = tl.constexpr(512)  # fewer programs than tiles
OPPOSED = tl.constexpr(1024)  # what makes up a class's target weight may differ in sign


@triton.jit
def addresses(spot, c, class_stride, FLAGS: tl.constexpr):
    if (PLANES & FLAGS) == 0:
        return spot.base + (spot.shift + c)
    if WIDE & FLAGS:
        return spot.base + (spot.shift + c.to(tl.int64) * class_stride)
    return spot.base + (spot.shift + c * class_stride)


@triton.jit
def readable(c, classes, counted, place, FLAGS: tl.constexpr):
    """Which elements are loaded, and which of them count. Rows that are ignored are not even read, unless that would
    take the loads of their neighbours apart."""
    here = (c < classes) & place.here
    ok = here & counted
    return (here if PLANES & FLAGS else ok), ok


@triton.jit
def load_y(logits, spot, c, here, ok, v, FLAGS: tl.constexpr, ACC: tl.constexpr, EVICT: tl.constexpr):
    """y, -inf where not ok, and dy/dx without its factor 1 / temperature."""
    at = addresses(spot, c, logits.class_stride, FLAGS)
    y = tl.load(at, mask=here, other=float("-inf"), eviction_policy=EVICT).to(ACC) * v.x_scale
    sech2 = tl.zeros([1, 1], ACC)
    if SOFTCAP & FLAGS:
        y, sech2 = tanh_sech2(y)
        y *= v.y_scale
    if (SOFTCAP | PLANES) & FLAGS:
        y = tl.where(ok, y, float("-inf"))
    return y, sech2


@triton.jit
def load_t(target, spot, c, here, v, FLAGS: tl.constexpr, ACC: tl.constexpr, EVICT: tl.constexpr):
    """A dense target's values; teacher logits are divided by their temperature. 0 without a dense target."""
    t = tl.zeros([1, 1], ACC)
    if target.dense is not None:
        at = addresses(spot, c, target.dense_class_stride, FLAGS)
        if TEACHER & FLAGS:
            t = tl.load(at, mask=here, other=float("-inf"), eviction_policy=EVICT).to(ACC) * v.dense_scale
        else:
            t = tl.load(at, mask=here, other=0.0, eviction_policy=EVICT).to(ACC)
    return t


@triton.jit
def load_tile(logits, target, place, c, here, ok, v, FLAGS: tl.constexpr, ACC: tl.constexpr, EVICT: tl.constexpr):
    y, sech2 = load_y(logits, place.logits, c, here, ok, v, FLAGS, ACC, EVICT)
    t = load_t(target, place.dense, c, here, v, FLAGS, ACC, EVICT)
    w = tl.full([1, 1], 1.0, ACC)
    if target.weight is not None:
        w = tl.load(target.weight + tl.broadcast_to(c, ok.shape), mask=ok, other=0.0)
    return Tile(y, sech2, t, w)


@triton.jit
def spot_of(block, b, i, s, FLAGS: tl.constexpr):
    """Rows b, b + 1, .. (i counts them) or, of planes, positions s, s + 1, .. of plane b."""
    base = block.data + (b * block.batch_stride + s)
    if PLANES & FLAGS:
        return Spot(base, i)
    if WIDE & FLAGS:
        return Spot(base, i.to(tl.int64) * block.batch_stride)
    return Spot(base, i * block.batch_stride)


@triton.jit
def locate(tile, logits, out, target, sizes, FLAGS: tl.constexpr, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None]
    if PLANES & FLAGS:
        tiles = tl.cdiv(sizes.inner, ROWS)
        b = tl.cast(tile // tiles, tl.int64)
        s = tl.cast(tile % tiles, tl.int64) * ROWS
        here = s + i < sizes.inner
        row = b * sizes.inner + s + i
    else:
        b = tl.cast(tile, tl.int64) * ROWS
        s = b * 0
        here = b + i < sizes.batch
        row = b + i
    at = spot_of(logits, b, i, s, FLAGS)
    at_out = at
    at_dense = at
    if out is not None:
        at_out = spot_of(out, b, i, s, FLAGS)
    if target.dense is not None:
        dense = Block(target.dense, target.dense_batch_stride, target.dense_class_stride)
        at_dense = spot_of(dense, b, i, s, FLAGS)
    return Place(row, here, at, at_out, at_dense)


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
    index = tl.where(ok, index, 0).to(tl.int32)
    weight = tl.full([1, 1], 1.0, ACC)
    if target.weight is not None:
        weight = tl.load(target.weight + index, mask=ok, other=0.0)
    y, sech2 = load_y(logits, place.logits, index, ok, ok, v, FLAGS, ACC, "evict_last")
    counted = tl.max(used.to(tl.int32), axis=1, keep_dims=True) > 0
    wrong = tl.max((used & (ok == 0)).to(tl.int32), axis=1, keep_dims=True) > 0
    return Entries(ok, index, load_value(target, at, used, ACC), weight, y, sech2, counted, wrong)


@triton.jit
def entry_of(target, place, j, sizes, ACC: tl.constexpr):
    """Class and value of each row's entry j, (ROWS, 1) each; the value is 0 where it is padding."""
    at = place.row * sizes.entries + j
    index = tl.load(target.index + at, mask=place.here, other=0)
    return index, load_value(target, at, place.here & (index != sizes.ignore_index), ACC)


@triton.jit
def entry_totals(target, place, en, sizes, ACC: tl.constexpr):
    """(ROWS, K): the summed value of each entry's class, over all of the row's entries of that class."""
    total = tl.zeros_like(en.value)
    for j in range(sizes.entries):
        index, value = entry_of(target, place, j, sizes, ACC)
        total += tl.where(index == en.index, value, 0.0)
    return total


@triton.jit
def entries_best(target, place, en, sizes, ACC: tl.constexpr, K: tl.constexpr):
    """(ROWS, 1): the class with the largest summed value, the smallest one on a tie."""
    total = entry_totals(target, place, en, sizes, ACC)
    total = tl.where(tl.arange(0, K)[None, :] < sizes.entries, total, float("-inf"))
    first = tl.where(total == tl.max(total, axis=1, keep_dims=True), en.index, 2147483647)
    return tl.min(first, axis=1, keep_dims=True)
