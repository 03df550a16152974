# SPDX-License-Identifier: BSD-3-Clause
"""The fused linear loss: ``cross_entropy(linear(x, W, b), target)`` without the logits. Method: ``docs/linear.md``.

All of it is public as ``softce.linear_cross_entropy``, ``softce.LinearTeacher`` and so on.
"""

from __future__ import annotations

from .chunks import Plan
from .functional import LogProbs, linear_cross_entropy, linear_logprobs, plan
from .modules import LinearCrossEntropyLoss
from .targets import LinearTeacher

__all__ = [
    "LinearCrossEntropyLoss",
    "LinearTeacher",
    "LogProbs",
    "Plan",
    "linear_cross_entropy",
    "linear_logprobs",
    "plan",
]
