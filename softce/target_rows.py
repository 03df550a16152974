# SPDX-License-Identifier: BSD-3-Clause
"""Facts about a target in kernel form, one a row: its entropy, its factor by class, what it adds to a mean's count.

All are plain torch and differentiable. Dense targets are worked through a few rows at a time, so that nothing of the
target's size is allocated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .autograd import Call, row_stats
from .ops import DENSE_LOGITS, LOSS, KernelTarget, Spec
from .targets import first_occurrence

# Elements that are held at a time: large enough to be efficient, small enough to stay in the cache.
_CHUNK = 1 << 17


def _over_dense(target: KernelTarget, spec: Spec, acc: torch.dtype, of_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """``of_rows`` on the target ``t`` as ``(R, C)``, in pieces."""
    assert target.dense is not None
    rows = reference.as_rows(target.dense)
    pieces = (target._replace(dense=rows[part]) for part in _pieces(rows.shape[0], rows.shape[1]))
    parts = [of_rows(reference.dense_target(piece, spec, acc)) for piece in pieces]
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=acc)


def _pieces(rows: int, each: int) -> list[slice]:
    """Parts of so many rows of ``each`` elements; one in a compiled graph.

    There a loop would be unrolled, for this number of rows alone, and the compiler fuses what it is given anyway.
    """
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, _CHUNK // max(1, each))
    return [slice(i, i + step) for i in range(0, rows, step)]


def target_entropy(
    target: KernelTarget, ignore_index: int, spec: Spec, acc: torch.dtype, classes: int, kernel: bool = False
) -> Tensor:
    """``-sum_c w_c t'_c log t'_c`` of each row, ``(R,)``; ``0 log 0 = 0``, and 0 where the row is ignored.

    Subtracted from the row loss ``-sum_c w_c t'_c log p_c`` it leaves ``KL(t' || p)``. ``kernel``: the row operations
    take tensors like the target; the entropy of teacher logits is then their cross-entropy with themselves.
    """
    weight = target.weight
    smoothed = (spec.mix_a, spec.mix_b) != (1.0, 0.0)
    if target.index is None:
        assert target.dense is not None
        if kernel and classes and spec.dense_kind == DENSE_LOGITS and weight is None and not smoothed:
            own = Spec(
                temperature=spec.dense_temperature, dense_kind=DENSE_LOGITS, dense_temperature=spec.dense_temperature
            )
            return row_stats(target.dense, Call(KernelTarget(dense=target.dense), -100, own), False)[LOSS]

        def entropy(t: Tensor) -> Tensor:
            t = spec.mix_a * t + spec.mix_b if smoothed else t
            each = t * torch.log(torch.where(t == 0, 1.0, t))  # torch.special.entr has no vector code on CPU
            return -(each if weight is None else each * weight).sum(1)  # a matrix product would be autocast

        return _over_dense(target, spec, acc, entropy)

    index, value = target.index, target.value
    value = torch.ones(index.shape, dtype=acc, device=index.device) if value is None else value
    parts = []
    for part in _pieces(index.shape[0], index.shape[1] ** 2):
        rest = 0.0 if target.rest is None else target.rest[part, None]
        parts.append(_sparse_entropy(index[part], value[part], rest, weight, ignore_index, spec, classes))
    return torch.cat(parts) if parts else value.new_zeros(0)


def _sparse_entropy(
    index: Tensor,
    value: Tensor,
    rest: Tensor | float,
    weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    classes: int,
) -> Tensor:
    padding = index == ignore_index
    value = torch.where(padding, 0.0, value)
    together = ((index[:, :, None] == index[:, None, :]) * value[:, None, :]).sum(-1)
    every = torch.as_tensor(spec.mix_a * rest + spec.mix_b, dtype=value.dtype, device=value.device)
    others = torch.special.entr(every)
    more = torch.special.entr(spec.mix_a * together + every) - others
    if weight is not None:
        more = more * weight[torch.where(padding, 0, index)]
    counted = first_occurrence(index) & ~padding
    everywhere = others * (classes if weight is None else weight.sum())
    total = torch.where(counted, more, 0.0).sum(1) + everywhere.squeeze(-1)
    return torch.where(padding.all(1), 0.0, total)


def check_class_factor(class_factor: Tensor, classes: int, device: torch.device) -> None:
    """Raise for factors by class that do not fit logits of ``classes`` classes on ``device``."""
    if class_factor.shape[0] != classes:
        raise ValueError(f"row_loss: expected one factor for each of {classes} classes, got {class_factor.shape[0]}")
    if class_factor.device != device:
        raise RuntimeError(
            f"row_loss: expected its factors by class on {device}, as the input, got {class_factor.device}"
        )


def class_factor_rows(
    class_factor: Tensor, target: KernelTarget, ignore_index: int, spec: Spec, acc: torch.dtype
) -> Tensor:
    """``sum_c class_factor_c t_c`` of each row, ``(R,)``, for ``t`` before smoothing and weights; 0 if ignored."""
    factor = class_factor.to(acc)
    if target.index is None:
        return _over_dense(target, spec, acc, lambda t: (t * factor).sum(1))
    padding = target.index == ignore_index
    found = factor[torch.where(padding, 0, target.index)] if factor.numel() else factor.new_zeros(padding.shape)
    found = torch.where(padding, 0.0, found if target.value is None else found * target.value).sum(1)
    if target.rest is None:
        return found
    return torch.where(padding.all(1), 0.0, found + target.rest * factor.sum())


def counts(target: KernelTarget, ignore_index: int, like: Tensor) -> Tensor:
    """What each row adds to a mean's denominator, as the statistic of that name; ``(R,)``, dtype of ``like``."""
    valid = reference.valid_rows(target, ignore_index)
    if valid is None:
        return torch.ones_like(like)
    if target.index is not None and target.weight is not None and target.value is None and target.index.shape[1] == 1:
        return torch.where(valid, target.weight[torch.where(valid, target.index[:, 0], 0)], 0.0)
    return valid.to(like.dtype)
