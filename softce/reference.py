# SPDX-License-Identifier: BSD-3-Clause
"""The specification: the row equation in plain PyTorch, differentiable any number of times.

It is what the kernels are held against, what runs where no kernel can (``create_graph``, forward-mode AD,
``torch.func`` transforms, devices without a kernel), and the place to read what softce computes. With ``x`` a row of
logits over C classes::

    y   = softcap * tanh(x / softcap) / temperature        (softcap = 0: y = x / temperature)
    lse = logsumexp(y),  p = exp(y - lse)
    t'  = mix_a * t + mix_b                                (label smoothing)
    q   = w * t'                                           (class weights)
    l   = sum(q) * lse - sum(q * y) + z_loss * lse^2

where ``0 * (-inf)`` counts as 0: a class without target weight may be masked out with a logit of ``-inf``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import DENSE_LOGITS, KernelTarget, Spec, acc_dtype


def as_rows(block: Tensor) -> Tensor:
    """Kernel layout, ``(R, C)`` or ``(B, C, S)``, as ``(R, C)``."""
    return block if block.dim() == 2 else block.movedim(1, -1).flatten(0, 1)


def transform(x: Tensor, spec: Spec) -> Tensor:
    """``y`` from ``x``."""
    if spec.softcap:
        x = torch.tanh(x / spec.softcap) * spec.softcap
    return x if spec.temperature == 1.0 else x / spec.temperature


def valid_rows(target: KernelTarget, ignore_index: int) -> Tensor | None:
    """Bool ``(R,)``: rows that are not ignored; ``None`` where every row counts (dense targets)."""
    return None if target.index is None else (target.index != ignore_index).any(1)


def _dot(q: Tensor, y: Tensor) -> Tensor:
    """Row sums of ``q * y`` with ``0 * (-inf) = 0``; the gradient for ``q`` stays ``y`` wherever ``y`` is finite."""
    return (q * torch.where((q == 0) & (y == -torch.inf), 0.0, y)).sum(-1)


def dense_target(target: KernelTarget, spec: Spec, acc: torch.dtype) -> Tensor:
    """``t`` of a dense target, ``(R, C)``."""
    assert target.dense is not None
    t = as_rows(target.dense).to(acc)
    return torch.softmax(t / spec.dense_temperature, -1) if spec.dense_kind == DENSE_LOGITS else t


def row_stats(logits: Tensor, target: KernelTarget, ignore_index: int, spec: Spec, extras: bool = False) -> Tensor:
    """The statistics of ``softce::row_stats``, as that operator returns them, differentiable for every input.

    Args:
        logits: ``(R, C)`` or ``(B, C, S)``.
        target: in kernel form.
        ignore_index: sparse entries of this class are padding.
        spec: the scalars.
        extras: also target log-probability, entropy and correctness.

    Returns:
        ``(STATS, R)`` or ``(STATS_EXTRA, R)``.
    """
    acc = acc_dtype(logits.dtype)
    x = as_rows(logits).to(acc)
    classes = x.shape[1]
    valid = valid_rows(target, ignore_index)
    if valid is not None:
        x = torch.where(valid[:, None], x, 0.0)
    y = transform(x, spec)

    # Everything is taken relative to the row's maximum: sums of q * y for huge logits would cancel.
    top = y.detach().amax(1) if classes else y.new_zeros(y.shape[0])
    top = torch.where(top == -torch.inf, 0.0, top)
    y = y - top[:, None]
    shifted_lse = torch.log(torch.exp(y).sum(1)) if classes else y.sum(1)
    lse = shifted_lse + top

    weight = target.weight
    best = None
    if target.index is not None:
        assert valid is not None
        padding = target.index == ignore_index
        # Of no classes every entry is out of range but padding, and gather and scatter say so.
        index = torch.where(padding, 0, target.index) if classes else (~padding).long()
        value = torch.ones((), dtype=acc, device=x.device) if target.value is None else target.value
        value = torch.where(padding, 0.0, value)
        best = argmax_sparse(index, value) if extras else None
        some = y if classes else y.new_zeros(y.shape[0], 1)
        single = index.shape[1] == 1
        of_entry = weight[index] if weight is not None and classes and single else None
        plain_indices = target.value is None and single
        count = torch.ones_like(lse) if of_entry is None or not plain_indices else of_entry[:, 0]
        count = torch.where(valid, count, 0.0)
        if single and target.rest is None and not spec.mix_b:  # no need for C weights a row
            t, weight, y_of_t = value, of_entry, torch.gather(some, 1, index)
        else:
            t, y_of_t = torch.zeros_like(some).scatter_add(1, index, value)[:, :classes], y
            t = t if target.rest is None else t + target.rest[:, None]
    else:
        t, y_of_t = dense_target(target, spec, acc), y
        count = torch.ones_like(lse) if classes else torch.zeros_like(lse)  # numel / C rows: 0 / 0 of no classes

    # Smoothing and weights come class by class: terms of opposite sign would not cancel where y is -inf.
    q = spec.mix_a * t + spec.mix_b
    q = q if weight is None else q * weight
    mass, dot = q.sum(1), _dot(q, y_of_t)
    loss = mass * shifted_lse - dot
    if spec.z_loss:
        loss = loss + spec.z_loss * lse * lse
    rows = [loss, lse, mass, count]
    if extras:
        p = torch.exp(y - shifted_lse[:, None])
        logp = _dot(t, y_of_t) - t.sum(1) * shifted_lse
        best = t.detach().argmax(1) if best is None else best
        correct = (y.detach().argmax(1) == best).to(acc)
        rows += [logp, shifted_lse - _dot(p, y), correct]
    if valid is not None:
        rows = [torch.where(valid, row, 0.0) for row in rows]
    return torch.stack(rows)


def argmax_sparse(index: Tensor, value: Tensor) -> Tensor:
    """The class with the largest accumulated value of each row of a sparse target; the smaller class on a tie."""
    value = value.detach()
    same = index[:, :, None] == index[:, None, :]
    total = (same * value[:, None, :]).sum(-1)
    best = total.amax(1, keepdim=True)
    return torch.where(total == best, index, torch.iinfo(torch.int64).max).amin(1)
