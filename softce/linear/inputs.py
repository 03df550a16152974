# SPDX-License-Identifier: BSD-3-Clause
"""What a fused linear loss is computed from, and which of its rows are left once the ignored ones are dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import BAD_INDEX
from ..ops import KernelTarget, Spec


class Tensors(NamedTuple):
    """The tensors of a call. R rows; each row of ``input`` and of a dense target is used once at most.

    A dense target is ``dense`` or, as teacher logits, the linear map of the three ``teacher`` tensors.
    """

    input: Tensor  # (N, H)
    linear_weight: Tensor  # (V, H)
    linear_bias: Tensor | None  # (V,)
    index: Tensor | None  # type: ignore[assignment]  # (R, K), as ops.KernelTarget
    value: Tensor | None  # (R, K)
    rest: Tensor | None  # (R,)
    dense: Tensor | None  # (M, V)
    weight: Tensor | None  # (V,)
    teacher_input: Tensor | None  # (M, G)
    teacher_weight: Tensor | None  # (V, G)
    teacher_bias: Tensor | None  # (V,)
    rows: Tensor | None  # int64 (R,): the row of input; None: all, in order
    target_rows: Tensor | None  # int64 (R,): the row of dense or teacher_input; None: all, in order

    @property
    def classes(self) -> int:
        return self.linear_weight.shape[0]

    @property
    def row_count(self) -> int:
        """R"""
        if self.index is not None:
            return self.index.shape[0]
        return self.input.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def sparse(self) -> KernelTarget:
        """What of the target is small: without the dense part."""
        return KernelTarget(self.index, self.value, self.rest, None, self.weight)


class Work(NamedTuple):
    """How to go about it, besides the tensors."""

    ignore_index: int
    spec: Spec
    budget: int | None  # Options.memory_budget
    kernel: bool  # the row operations run in a kernel


class Kept(NamedTuple):
    """The rows that are not ignored: what is left of the tensors, and where those rows stood (None: all are left)."""

    tensors: Tensors
    positions: Tensor | None

    def select(self, per_row: Tensor | None) -> Tensor | None:
        """The kept entries of a tensor whose last dimension is R."""
        return per_row if per_row is None or self.positions is None else per_row.index_select(-1, self.positions)

    def spread(self, stats: Tensor, count: int) -> Tensor:
        """The inverse of ``select``, 0 for the other rows."""
        if self.positions is None:
            return stats
        return stats.new_zeros(stats.shape[0], count).index_copy_(1, self.positions, stats)


def check_index(index: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Bool ``(R,)``: rows with a class. ``IndexError`` for one out of range."""
    used = index != ignore_index
    bad = used & ((index < 0) | (index >= classes))
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise IndexError(
            f"{BAD_INDEX}: value {int(index[row][bad[row]][0])} in row {row}, expected 0 <= target < {classes} (the "
            f"number of classes) or ignore_index ({ignore_index})"
        )
    return used.any(1)


def keep_rows(tensors: Tensors, ignore_index: int) -> Kept:
    """Drop the ignored rows; ``IndexError`` for a class out of range, before anything is computed."""
    index = tensors.index
    if index is None or index.device.type == "meta":
        return Kept(tensors, None)
    if index.device.type == "cpu" and index.numel():  # the common case in one look
        low, high = (int(v) for v in torch.aminmax(index))
        if low >= 0 and high < tensors.classes and not low <= ignore_index <= high:
            return Kept(tensors, None)
    used = check_index(index, ignore_index, tensors.classes)
    if bool(used.all()):
        return Kept(tensors, None)
    positions = used.nonzero().squeeze(1)

    def pick(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.index_select(0, positions)

    rows = positions if tensors.rows is None else tensors.rows.index_select(0, positions)
    smaller = tensors._replace(index=pick(index), value=pick(tensors.value), rest=pick(tensors.rest), rows=rows)
    return Kept(smaller, positions)
