# SPDX-License-Identifier: BSD-3-Clause
"""The chunk loop: a linear map, its row operations and its gradients, a block of logits at a time.

A block is some rows of the logits with all their classes or, where memory is too short for enough rows, a tile of the
classes. Its buffer is reused from block to block. With all classes in it one pass does everything::

    logits = x W^T;  logits -> dlogits in place;  dx = dlogits W;  dW += dlogits^T x

Tiles go over the weight twice, for the statistics of the rows and then, from logits that are computed again, for the
gradients; a tile's part of ``dW`` is then written once. Rows that are ignored are dropped before the first product.

Nothing here is differentiated: :mod:`softce.linear.autograd` is built on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..autograd import Call, plain_target, reference_vjp
from ..coefficients import loss_slope, row_coefficients, without_logp
from ..ops import DENSE_LOGITS, DENSE_PROBS, LSE, TARGET_LOGP, acc_dtype
from ..reduction import per_mean, reduce_stats
from ..target_rows import counts
from . import row_ops
from .chunks import Chunking, blocks, choose, costs, reserve, row_copies, weight_tile, widths, work_dtype
from .inputs import Kept, Tensors, Work, keep_rows
from .map import Map
from .products import Pieces

_POOLED = 64 << 20  # bytes of a memory budget from which on the pool's rounding does not count


class Loop:
    """One pass, or two over tiles, through the blocks of a call."""

    def __init__(
        self, tensors: Tensors, work: Work, needs: tuple[bool, ...] = (False,) * 13, *, tiles: bool = True
    ) -> None:
        t, self.work = tensors, work
        self.tensors = tensors
        self.dtype = work_dtype(t.input.dtype, t.input.device.type)
        self.acc = acc_dtype(t.input.dtype)
        hidden, widened = widths(t.input, t.teacher_input, self.dtype)
        self.copies = _copies_target(tensors, self.dtype)
        self.chunk = self._choose(hidden, widened, tiles)
        if self.tiled and work.spec.dense_kind == DENSE_LOGITS and not self.copies:
            self.copies = True  # tiles of teacher logits become probabilities in place
            self.chunk = self._choose(hidden, widened, tiles)
        block = self.chunk.rows * self.chunk.classes
        self.buffer = self._memory(block)
        self.dense = self._memory(block) if self.copies else None
        tile = weight_tile(hidden, work.budget, widened, self.dtype)
        student = (t.input, t.linear_weight, t.linear_bias)
        self.student = Map(*student, t.rows, needs[:3], tile, self.dtype, self._pieces(t.input), self._memory)
        self.teacher: Map | None = None
        if t.teacher_input is not None:
            assert t.teacher_weight is not None
            teacher = (t.teacher_input, t.teacher_weight, t.teacher_bias)
            pieces = self._pieces(t.teacher_input)
            self.teacher = Map(*teacher, t.target_rows, needs[8:11], tile, self.dtype, pieces, self._memory)
        # Of all rows; only where a teacher's logits come in tiles, whose softmax would be over the tile.
        teacher_tiles = self.tiled and work.spec.dense_kind == DENSE_LOGITS
        self.teacher_lse = t.input.new_empty((t.row_count,), dtype=self.acc) if teacher_tiles else None
        self.teacher_rows = 0  # how many of them are known

    def _choose(self, hidden: int, widened: int, tiles: bool) -> Chunking:
        t = self.tensors
        gathered = row_copies(t.rows is not None or t.target_rows is not None, t.teacher_input)
        cost = costs(hidden, self.dtype, copies=self.copies, widened=widened, gathered=gathered)
        return choose(t.row_count, t.classes, cost, self.work.budget, t.input.device.type, tiles=tiles)

    def _memory(self, size: int) -> Tensor:
        """Room for so many values. The pool's comes in pieces of 2 MiB, which a small budget has no room for."""
        budget = self.work.budget
        if budget is not None and budget < _POOLED:
            return self.tensors.input.new_empty((size,), dtype=self.dtype)
        return ops.new_empty(self.tensors.input, (size,), self.dtype)

    def _pieces(self, input: Tensor) -> Pieces:
        budget = self.work.budget
        room = None if budget is None else reserve(budget, tiled=self.tiled)
        return Pieces.of(self.chunk.rows, input.shape[1], self.chunk.classes, room)

    @property
    def tiled(self) -> bool:
        return self.chunk.classes < self.tensors.classes

    def rows(self) -> Iterator[tuple[int, int]]:
        """Go through the blocks of rows."""
        for a, b in blocks(self.tensors.row_count, self.chunk.rows):
            self.a, self.b = a, b
            self.student.take(a, b)
            if self.teacher is not None:
                self.teacher.take(a, b)
            if self.teacher_lse is not None and self.teacher_rows < b:
                self.teacher_lse[a:b] = self._teacher_lse()
                self.teacher_rows = b
            yield a, b

    def tiles(self) -> Iterator[tuple[int, int]]:
        """The tiles of the classes; one, if a block holds them all."""
        yield from blocks(self.tensors.classes, self.chunk.classes)

    def logits(self, lo: int, hi: int) -> Tensor:
        """The logits of the block's rows for the classes ``lo`` to ``hi``."""
        out = self.buffer[: (self.b - self.a) * (hi - lo)].view(self.b - self.a, hi - lo)
        self.student.product(lo, hi, out)
        return out

    def call(self, lo: int, hi: int) -> Call:
        """The block's target for the classes ``lo`` to ``hi``."""
        t, work = self.tensors, self.work
        spec = work.spec
        dense = None
        if t.index is None:
            dense = self._dense(lo, hi)
            if self.teacher_lse is not None:
                dense = dense.div_(spec.dense_temperature).sub_(self.teacher_lse[self.a : self.b, None]).exp_()
                spec = spec._replace(dense_kind=DENSE_PROBS)
        target = row_ops.rows_of(t.sparse, self.a, self.b)._replace(dense=dense)
        call = Call(target, work.ignore_index, spec)
        return row_ops.tile_of(call, lo, hi, self.acc) if self.tiled else call

    def _dense(self, lo: int, hi: int) -> Tensor:
        """Dense target values as they are where the kernels can read them, else in the second buffer."""
        t = self.tensors
        if not self.copies:
            assert t.dense is not None
            return t.dense[self.a : self.b, lo:hi]
        assert self.dense is not None
        out = self.dense[: (self.b - self.a) * (hi - lo)].view(self.b - self.a, hi - lo)
        if self.teacher is not None:
            self.teacher.product(lo, hi, out)
        else:
            assert t.dense is not None
            part = t.dense[:, lo:hi]
            if t.target_rows is None:
                out.copy_(part[self.a : self.b])
            elif part.dtype == out.dtype:
                torch.index_select(part, 0, t.target_rows[self.a : self.b], out=out)
            else:
                out.copy_(part.index_select(0, t.target_rows[self.a : self.b]))
        return out

    def _teacher_lse(self) -> Tensor:
        temperature = self.work.spec.dense_temperature
        parts = [row_ops.row_lse(self._dense(lo, hi), temperature, self.work.kernel) for lo, hi in self.tiles()]
        return torch.logsumexp(torch.stack(parts), 0)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """What the maps collected, in the order of :class:`Tensors`."""
        teacher = (None,) * 3 if self.teacher is None else self.teacher.finish()
        return (*self.student.finish(), *(None,) * 5, *teacher, None, None)


def _copies_target(t: Tensors, work: torch.dtype) -> bool:
    """Whether a dense target goes through a buffer of the chunk's size."""
    if t.index is not None:
        return False
    if t.dense is None or t.target_rows is not None or t.dense.dtype != work:
        return True
    return t.dense.stride(1) != 1 or (t.input.device.type != "cpu" and t.dense.stride(0) == 0)


def stats(tensors: Tensors, work: Work, extras: bool) -> Tensor:
    """``(STATS or STATS_EXTRA, R)`` statistics of the rows, as ``softce::row_stats`` gives them."""
    kept = keep_rows(tensors, work.ignore_index)
    loop = Loop(kept.tensors, work)
    found = _stats(loop, extras)
    return kept.spread(found, tensors.row_count)


def _stats(loop: Loop, extras: bool) -> Tensor:
    t = loop.tensors
    shape = (ops.STATS_EXTRA if extras else ops.STATS, t.row_count)
    found = t.input.new_empty(shape, dtype=loop.acc)
    for a, b in loop.rows():
        found[:, a:b] = _tile_stats(loop, extras, a, b) if loop.tiled else _row_stats(loop, extras)
    return found


def _row_stats(loop: Loop, extras: bool) -> Tensor:
    classes = loop.tensors.classes
    return row_ops.row_stats(loop.logits(0, classes), loop.call(0, classes), extras, loop.work.kernel)


def _tile_stats(loop: Loop, extras: bool, a: int, b: int) -> Tensor:
    t, work = loop.tensors, loop.work
    target = row_ops.rows_of(t.sparse, a, b)
    sums = row_ops.TileSums(Call(target, work.ignore_index, work.spec), extras, work.kernel)
    for lo, hi in loop.tiles():
        sums.add(loop.logits(lo, hi), loop.call(lo, hi), lo)
    return sums.finish(counts(target, work.ignore_index, t.input.new_empty(b - a, dtype=loop.acc)))


def gradients(
    tensors: Tensors, work: Work, found: Tensor, grad: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the statistics ``found`` with the gradients ``grad``: one for each of :class:`Tensors` in ``needs``.

    The logits are computed again. Gradients of targets come from the plain formula, a chunk of rows at a time.
    """
    kept = keep_rows(tensors, work.ignore_index)
    found, grad = kept.select(found), kept.select(grad.to(found.dtype))  # type: ignore[assignment]
    call = Call(tensors.sparse, work.ignore_index, work.spec)
    extras = found.shape[0] > ops.STATS
    by_formula = any(needs[3:])
    logp_apart = extras and not plain_target(call)
    loop = Loop(kept.tensors, work, needs, tiles=not (by_formula or logp_apart))
    if by_formula:
        return _formula_gradients(loop, kept, tensors, grad, needs, extras)
    of_logp = grad[TARGET_LOGP] if logp_apart else None
    coef = row_coefficients(found, without_logp(grad) if logp_apart else grad, work.spec)
    _add_gradients(loop, found[LSE], coef, of_logp)
    return loop.gradients()


def _add_gradients(loop: Loop, lse: Tensor, coef: Tensor, of_logp: Tensor | None = None) -> None:
    """``of_logp``: the gradient of the target's log-probability where it is not in ``coef``; for whole rows only."""
    for a, b in loop.rows():
        row_lse, row_coef = lse[a:b].contiguous(), coef[:, a:b].contiguous()
        for lo, hi in loop.tiles():
            logits, call = loop.logits(lo, hi), loop.call(lo, hi)
            more = None if of_logp is None else row_ops.logp_grad(logits, call, of_logp[a:b], loop.work.kernel)
            row_ops.row_grad_(logits, row_lse, row_coef, call, loop.work.kernel)
            loop.student.add(lo, hi, logits if more is None else logits.add_(more))


def _formula_gradients(
    loop: Loop, kept: Kept, tensors: Tensors, grad: Tensor, needs: tuple[bool, ...], extras: bool
) -> tuple[Tensor | None, ...]:
    """Gradients that no kernel gives: those of targets."""
    t, classes = loop.tensors, loop.tensors.classes
    dense_wanted = needs[6] or any(needs[8:11])
    wanted = (any(needs[:3]), False, needs[4], needs[5], dense_wanted, needs[7])
    totals: list[Tensor | None] = [
        torch.zeros_like(x, dtype=loop.acc) if 4 <= i <= 7 and needs[i] and x is not None else None
        for i, x in enumerate(tensors)
    ]
    parts: dict[int, list[Tensor]] = {4: [], 5: []}
    for a, b in loop.rows():
        logits, call = loop.logits(0, classes), loop.call(0, classes)
        dlogits, _, dvalue, drest, ddense, dweight = reference_vjp(logits, call, grad[:, a:b], wanted, extras)
        if dlogits is not None:
            loop.student.add(0, classes, dlogits)
        for field, part in ((4, dvalue), (5, drest)):
            if part is not None:
                parts[field].append(part)
        if ddense is not None and loop.teacher is not None:
            loop.teacher.add(0, classes, ddense)
        elif ddense is not None:
            where = slice(a, b) if t.target_rows is None else t.target_rows[a:b]
            totals[6][where] = ddense.to(loop.acc)  # type: ignore[index]
        if dweight is not None:
            totals[7] += dweight  # type: ignore[operator]
    for field, found in parts.items():
        total = totals[field]
        if total is not None and found:
            joined = torch.cat(found)
            totals[field] = joined if kept.positions is None else total.index_copy_(0, kept.positions, joined)
    maps = loop.gradients()
    return tuple((maps[i] if maps[i] is not None else totals[i]) if needs[i] else None for i in range(len(needs)))


class Fused(NamedTuple):
    """A reduced loss with its gradients, which are for an upstream gradient of 1."""

    loss: Tensor
    stats: Tensor
    dinput: Tensor | None  # in the accumulation dtype, as the next two
    dweight: Tensor | None
    dbias: Tensor | None


def fused(
    tensors: Tensors, work: Work, row_weight: Tensor | None, mean: bool, extras: bool, needs: tuple[bool, bool, bool]
) -> Fused:
    """Loss and gradients in one go; ``row_weight`` is ``(R,)``, ``needs`` says for which of input, weight and bias."""
    kept = keep_rows(tensors, work.ignore_index)
    loop = Loop(kept.tensors, work, (*needs, *(False,) * 10))
    spec = work.spec
    weights = kept.select(row_weight)
    # What a mean divides by goes into the row weights.
    factor = _row_factor(loop.tensors, work, weights, mean, loop.acc)
    if loop.tiled:
        found = _stats(loop, extras)
        slope = loss_slope(found, factor, spec)
        _add_gradients(loop, found[LSE], row_coefficients(found[: ops.STATS], slope, spec))
    else:
        found = _fused_rows(loop, factor, extras)
    loss = reduce_stats(found, spec, weights, mean)
    return Fused(loss, kept.spread(found, tensors.row_count), *loop.student.finish())


def _fused_rows(loop: Loop, factor: Tensor, extras: bool) -> Tensor:
    t, work = loop.tensors, loop.work
    found = t.input.new_empty((ops.STATS_EXTRA if extras else ops.STATS, t.row_count), dtype=loop.acc)
    classes = t.classes
    spec = work.spec._replace(scale=1.0)
    for a, b in loop.rows():
        logits, call = loop.logits(0, classes), loop.call(0, classes)._replace(spec=spec)
        if work.kernel:
            arguments = (*call.target, factor[a:b].contiguous(), call.ignore_index, spec, False, extras)
            _, found[:, a:b] = ops.row_fused_(logits, *arguments)
        else:
            rows = row_ops.row_stats(logits, call, extras, False)
            coef = row_coefficients(rows[: ops.STATS], loss_slope(rows, factor[a:b], spec), spec)
            row_ops.row_grad_(logits, rows[LSE], coef, call, False)
            found[:, a:b] = rows
        loop.student.add(0, classes, logits)
    return found


def _row_factor(t: Tensors, work: Work, weights: Tensor | None, mean: bool, acc: torch.dtype) -> Tensor:
    """``(R,)``: what the row losses are multiplied with before they are summed."""
    if weights is None and (t.weight is None or t.index is None):  # every row that is left counts 1
        each = work.spec.scale / t.row_count if mean and t.row_count else work.spec.scale
        return t.input.new_full((t.row_count,), each, dtype=acc)
    ones = t.input.new_ones((t.row_count,), dtype=acc)
    factor = (ones if weights is None else weights) * work.spec.scale
    if not mean:
        return factor
    count = counts(t.sparse, work.ignore_index, factor)
    return per_mean(factor, count, weights, work.spec)
