# SPDX-License-Identifier: BSD-3-Clause
"""Probabilities as input instead of logits, as Keras takes them."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7


def clipped_probabilities(prob: Tensor, dim: int) -> Tensor:
    """``clip(p / sum(p), EPSILON, 1 - EPSILON)`` along ``dim``, at least in float32.

    Source: the ``from_logits=False`` way of Keras' cross-entropy losses. A value that was clipped has no gradient. A
    row of zeros, which has no such quotient, gives ``EPSILON`` everywhere.
    """
    if prob.dtype in (torch.bfloat16, torch.float16):
        prob = prob.to(torch.float32)
    total = prob.sum(dim, keepdim=True)
    return torch.clamp(prob / torch.where(total == 0, 1.0, total), EPSILON, 1.0 - EPSILON)


def log_probabilities(prob: Tensor, dim: int) -> Tensor:
    """The logarithm of :func:`clipped_probabilities`: finite whatever the probabilities are."""
    return torch.log(clipped_probabilities(prob, dim))
