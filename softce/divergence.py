# SPDX-License-Identifier: BSD-3-Clause
"""The target's own entropy: what turns a cross-entropy into a Kullback-Leibler divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .autograd import Call

# Elements of the target that are held at a time: large enough to be efficient, small beside any logits that matter.
_CHUNK = 1 << 22


def target_entropy(call: Call, acc: torch.dtype) -> Tensor:
    """``-sum_c w_c t'_c log t'_c`` of each row, ``(R,)``; ``0 log 0 = 0``.

    Subtracted from the row loss ``-sum_c w_c t'_c log p_c`` it leaves ``KL(t' || p)``. It is worked out a few rows at a
    time, so that nothing of the target's size is allocated.
    """
    target, spec = call.target, call.spec
    assert target.dense is not None, "sparse targets have no divergence form"
    rows = reference.as_rows(target.dense)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    parts = []
    for start in range(0, rows.shape[0], step):
        t = reference.dense_target(target._replace(dense=rows[start : start + step]), spec, acc)
        t = spec.mix_a * t + spec.mix_b
        entropy = torch.special.entr(t)
        parts.append(entropy.sum(1) if target.weight is None else entropy @ target.weight)
    return torch.cat(parts) if parts else rows.new_zeros(0, dtype=acc)
