# SPDX-License-Identifier: BSD-3-Clause
"""Errors of a contestant against float64, row block by row block so that no (N, C) float64 tensor is needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import KINDS, Inputs

BLOCK_ELEMENTS = 1 << 21


class Errors(NamedTuple):
    gradient: float  # relative Frobenius: ||g - g64|| / ||g64||
    loss: float  # relative


class Reference:
    """The mean loss of ``inputs`` and its gradient in float64, written out from the definition.

    With ``t'`` the (smoothed) target and N rows: ``l = -sum(t' * log_softmax(x)) / N`` and
    ``dl/dx = (softmax(x) * sum(t') - t') / N``.
    """

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        self.classes, self.rows = case.classes, case.rows
        self.smoothing = KINDS[case.kind].smoothing
        self.logits = _as_rows(inputs.logits.detach())
        self.dense = KINDS[case.kind].dense
        self.target = _as_rows(inputs.target) if self.dense else inputs.target.reshape(-1)
        self.step = max(1, BLOCK_ELEMENTS // self.classes)

    def blocks(self):  # type: ignore[no-untyped-def]
        """Yields ``(rows, sum of row losses, gradient of the mean)`` for one block of rows after the other."""
        for start in range(0, self.rows, self.step):
            rows = slice(start, start + self.step)
            logp = self.logits[rows].double().log_softmax(1)
            if self.dense:
                target = self.target[rows].double()
            else:
                target = torch.zeros_like(logp).scatter_(1, self.target[rows].unsqueeze(1), 1.0)
            target = target * (1 - self.smoothing) + self.smoothing / self.classes
            grad = (logp.exp() * target.sum(1, keepdim=True) - target) / self.rows
            yield rows, -(target * logp).sum(), grad

    def errors(self, contestants: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Errors]:
        """Errors of each contestant's ``(loss, gradient)``, in one pass over the reference."""
        norm = loss = 0.0
        wrong = dict.fromkeys(contestants, 0.0)
        rows_of = {name: _as_rows(gradient) for name, (_, gradient) in contestants.items()}
        for rows, block_loss, grad in self.blocks():
            loss += float(block_loss)
            norm += float(grad.square().sum())
            for name in contestants:
                wrong[name] += float((rows_of[name][rows].double() - grad).square().sum())
        loss /= self.rows
        return {
            name: Errors((wrong[name] / norm) ** 0.5, abs(float(value.detach()) - loss) / abs(loss))
            for name, (value, _) in contestants.items()
        }


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def gradient_limit(dtype: torch.dtype) -> float:
    """Beyond this error a contestant does not compute the loss: 0.1%, or four roundings of ``dtype``."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)
