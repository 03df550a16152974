# SPDX-License-Identifier: BSD-3-Clause
"""Row operations on a chunk of logits: the kernels or, without them, the plain formula; and tiles over the classes.

A tile holds the classes ``lo <= c < hi`` of its rows. Statistics of the tiles of a row add up to the row's: with
``gap_t = lse - lse_t`` ::

    lse = logsumexp_t(lse_t),  Q = sum_t Q_t,  l = sum_t (l_t + Q_t * gap_t)
    entropy = sum_t exp(-gap_t) * (entropy_t + gap_t)

and the gradient of a tile needs only the row's ``lse`` and coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..autograd import Call, logp_call, plain_target
from ..coefficients import logp_coefficients
from ..ops import (
    ENTROPY,
    LOSS,
    LSE,
    MASS,
    PHI_IDENTITY,
    STATS,
    TARGET_LOGP,
    KernelTarget,
    Spec,
    acc_dtype,
)

_PLAIN_ELEMENTS = 1 << 20  # elements that the plain formula works on at a time


def row_stats(logits: Tensor, call: Call, extras: bool, kernel: bool) -> Tensor:
    """``softce::row_stats``."""
    if kernel:
        stats: Tensor = ops.row_stats(logits, *call.target, call.ignore_index, call.spec, extras)
        return stats
    parts = [
        reference.row_stats(logits[a:b], rows_of(call.target, a, b), call.ignore_index, call.spec, extras)
        for a, b in _steps(logits)
    ]
    return torch.cat(parts, 1)


def row_lse(logits: Tensor, temperature: float, kernel: bool) -> Tensor:
    """``logsumexp(logits / temperature)`` of each row."""
    index = torch.zeros((logits.shape[0], 1), dtype=torch.int64, device=logits.device)
    call = Call(KernelTarget(index), -1, Spec(temperature=temperature))
    return _masked(logits, row_stats(logits, call, False, kernel))[LSE]


def _masked(logits: Tensor, stats: Tensor) -> Tensor:
    """Statistics whose lse is -inf where all logits are: as a whole row such a row is nan, as a tile it is nothing."""
    if bool(stats[LSE].isnan().any()):
        stats[LSE].masked_fill_(logits.amax(1) == -torch.inf, -torch.inf)
    return stats


def row_grad_(logits: Tensor, lse: Tensor, coef: Tensor, call: Call, kernel: bool) -> None:
    """``softce::row_grad_``."""
    if kernel:
        ops.row_grad_(logits, lse, coef, *call.target, call.ignore_index, call.spec)
        return
    for a, b in _steps(logits):
        part = call._replace(target=rows_of(call.target, a, b))
        logits[a:b].copy_(_plain_grad(logits[a:b], lse[a:b], coef[:, a:b], part))


def logp_grad(logits: Tensor, call: Call, grad: Tensor, kernel: bool) -> Tensor:
    """The gradient of the target's log-probability for the logits, where smoothing and weights set it apart."""
    plain = logp_call(call)
    stats = row_stats(logits, plain, False, kernel)
    found = logits.clone()
    row_grad_(found, stats[LSE], logp_coefficients(stats, grad, plain.spec), plain, kernel)
    return found


def _steps(logits: Tensor) -> list[tuple[int, int]]:
    step = max(1, _PLAIN_ELEMENTS // max(1, logits.shape[1]))
    return [(a, min(a + step, logits.shape[0])) for a in range(0, logits.shape[0], step)] or [(0, 0)]


def rows_of(target: KernelTarget, a: int, b: int) -> KernelTarget:
    """Rows ``a`` to ``b`` of a target in kernel form."""
    index, value, rest, dense, weight = target

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[a:b]

    return KernelTarget(part(index), part(value), part(rest), part(dense), weight)


def _plain_grad(logits: Tensor, lse: Tensor, coef: Tensor, call: Call) -> Tensor:
    """``dlogits = (p * (A + B * y) - D * q) * dy/dx`` in plain PyTorch (csrc/softce.h: ``launch_row_grad``)."""
    target, spec = call.target, call.spec
    acc = acc_dtype(logits.dtype)
    x = logits.to(acc)
    y = reference.transform(x, spec)
    p = torch.exp(y - lse[:, None])
    factor = coef[0][:, None]
    if coef.shape[0] == 3:
        factor = factor + coef[2][:, None] * torch.where(p == 0, 0.0, y)
    grad = p * factor
    d = coef[1][:, None]
    if target.index is None:
        q = spec.mix_a * reference.dense_target(target, spec, acc) + spec.mix_b
        grad = grad - d * (q if target.weight is None else q * target.weight)
    else:
        if target.rest is not None or spec.mix_b:
            every = spec.mix_b if target.rest is None else spec.mix_a * target.rest[:, None] + spec.mix_b
            grad = grad - d * every * (1.0 if target.weight is None else target.weight)
        padding = target.index == call.ignore_index
        index = torch.where(padding, 0, target.index)
        value = torch.ones((), dtype=acc, device=x.device) if target.value is None else target.value
        entry = torch.where(padding, 0.0, spec.mix_a * value)
        entry = entry if target.weight is None else entry * target.weight[index]
        grad = grad.scatter_add(1, index, -d * entry)
    slope = 1.0 / spec.temperature
    if spec.softcap:
        grad = grad * (1 - torch.tanh(x / spec.softcap) ** 2)
    return torch.where((coef == 0).all(0)[:, None], 0.0, grad * slope)


def tile_of(call: Call, lo: int, hi: int, acc: torch.dtype) -> Call:
    """The call for the classes from ``lo`` to ``hi``; a dense target already holds those alone.

    No entry is padding here and each row has one at least, so that no row counts as ignored: entries of other tiles
    stand with weight 0 at the tile's first class. The loss has no z-loss and no row transform, which belong to the
    whole row.
    """
    target = call.target
    weight = None if target.weight is None else target.weight[lo:hi]
    spec = call.spec._replace(z_loss=0.0, phi=PHI_IDENTITY)
    if target.index is None:
        return Call(target._replace(weight=weight), call.ignore_index, spec)
    inside = (target.index >= lo) & (target.index < hi) & (target.index != call.ignore_index)
    index = torch.where(inside, target.index - lo, 0)
    value = inside.to(acc) if target.value is None else torch.where(inside, target.value, 0.0)
    return Call(KernelTarget(index, value, target.rest, None, weight), -1, spec)


class TileSums:
    """Collects the statistics of the rows of a block, tile by tile."""

    def __init__(self, call: Call, extras: bool, kernel: bool) -> None:
        self.call, self.extras, self.kernel = call, extras, kernel
        self.parts: list[Tensor] = []  # per tile: (STATS, rows)
        self.facts: list[Tensor] = []  # per tile, with extras: (STATS_EXTRA, rows) for the target as it was given
        self.best: list[tuple[Tensor, Tensor]] = []  # per tile: the largest logit and its class
        self.best_target: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, call: Call, lo: int) -> None:
        """The tile whose first class is ``lo``; ``call`` is that of :func:`tile_of`."""
        plain = plain_target(call)
        stats = _masked(logits, row_stats(logits, call, self.extras and plain, self.kernel))
        self.parts.append(stats[:STATS])
        if not self.extras:
            return
        if not plain:
            bare = Call(call.target._replace(weight=None), call.ignore_index, call.spec._replace(mix_a=1.0, mix_b=0.0))
            stats = row_stats(logits, bare, True, self.kernel)
        self.facts.append(stats)
        self.best.append(_top(logits, lo))
        if call.target.dense is not None:
            self.best_target.append(_top(call.target.dense, lo))

    def finish(self, count: Tensor) -> Tensor:
        """The statistics of the rows; ``count`` is that row of them."""
        parts = torch.stack(self.parts, 1)  # (STATS, tiles, rows)
        tile_lse, mass = parts[LSE], parts[MASS]
        lse = torch.logsumexp(tile_lse, 0)
        dead = tile_lse == -torch.inf
        gap = torch.where(dead, 0.0, lse - tile_lse)
        # A tile of masked classes alone: nothing without target weight, else infinite, as -inf at a target is.
        each = torch.where(dead, torch.where(mass == 0, 0.0, torch.inf), parts[LOSS] + mass * gap)
        loss = torch.where(lse == -torch.inf, torch.nan, each.sum(0))
        if self.call.spec.z_loss:
            loss = loss + self.call.spec.z_loss * lse * lse
        rows = [loss, lse, mass.sum(0), count]
        if self.extras:
            rows += self._extras(dead, gap)
        return torch.stack(rows)

    def _extras(self, dead: Tensor, gap: Tensor) -> list[Tensor]:
        facts = torch.stack(self.facts, 1)
        mass = facts[MASS]
        logp = torch.where(dead, torch.where(mass == 0, 0.0, -torch.inf), facts[TARGET_LOGP] - mass * gap)
        entropy = torch.where(dead, 0.0, torch.exp(-gap) * (facts[ENTROPY] + gap))
        index, value, *_ = self.call.target
        if index is None:
            want = _overall(self.best_target)
        else:
            padding = index == self.call.ignore_index
            value = torch.ones_like(index, dtype=gap.dtype) if value is None else value
            want = reference.argmax_sparse(torch.where(padding, 0, index), torch.where(padding, 0.0, value))
        return [logp.sum(0), entropy.sum(0), (_overall(self.best) == want).to(gap.dtype)]


def _top(x: Tensor, lo: int) -> tuple[Tensor, Tensor]:
    value, index = x.max(1)
    return value, index + lo


def _overall(tops: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The class of the largest value over all tiles, the first one on a tie."""
    values, classes = torch.stack([t[0] for t in tops]), torch.stack([t[1] for t in tops])
    return classes.gather(0, values.argmax(0, keepdim=True)).squeeze(0)
