# SPDX-License-Identifier: BSD-3-Clause
"""From row losses to the loss: transform, per-row weights, reduction. Plain torch on ``(R,)`` tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ops import COUNT, LOSS, Spec
from .row_losses import phi_of

Phi = Callable[[Tensor], Tensor]


def reduce_rows(
    loss: Tensor,
    count: Tensor,
    *,
    phi: Phi | None,
    row_weight: Tensor | None,
    reduction: str,
    scale: float = 1.0,
    empty_zero: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """``L = phi(l)`` times the row weights, reduced.

    Args:
        loss: ``(R,)`` row losses.
        count: ``(R,)`` what each row adds to the mean's denominator.
        phi: row transform, or ``None``.
        row_weight: ``(R,)`` or ``None``. ``mean`` is the weighted mean: it divides by ``sum(row_weight * count)``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        scale: multiplies the result.
        empty_zero: a mean over no counted row is 0 instead of nan.
        valid: bool ``(R,)``: rows whose loss stays 0 whatever ``phi`` makes of it are False.
    """
    if phi is not None:
        shape, loss = list(loss.shape), phi(loss)
        if not isinstance(loss, Tensor):
            raise TypeError(f"row_loss must return a Tensor, not {type(loss).__name__}")
        if list(loss.shape) != shape:
            raise ValueError(f"row_loss must return one loss a row, of shape {shape}, got shape {list(loss.shape)}")
        if valid is not None:
            loss = torch.where(valid, loss, 0.0)
    if row_weight is not None:
        loss, count = loss * row_weight, count * row_weight
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        total = count.sum()
        loss = torch.where(total == 0, 0.0, loss / torch.where(total == 0, 1.0, total)) if empty_zero else loss / total
    return loss if scale == 1.0 else loss * scale


def reduce_stats(stats: Tensor, spec: Spec, row_weight: Tensor | None, mean: bool) -> Tensor:
    """The mean or sum over rows with the statistics ``stats``, by the scalars ``spec``."""
    return reduce_rows(
        stats[LOSS],
        stats[COUNT],
        phi=phi_of(spec),
        row_weight=row_weight,
        reduction="mean" if mean else "sum",
        scale=spec.scale,
        empty_zero=bool(spec.empty_zero),
    )


def per_mean(factor: Tensor, count: Tensor, row_weight: Tensor | None, spec: Spec) -> Tensor:
    """``factor``, ``(R,)``, divided by what a mean divides by: a sum with it is that mean."""
    total = (count if row_weight is None else count * row_weight).sum()
    factor = factor / total
    return torch.where(total == 0, 0.0, factor) if spec.empty_zero else factor
