# SPDX-License-Identifier: BSD-3-Clause
"""``row_grad``'s coefficients: what the gradient of the statistics is for each row (docs/design.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import ENTROPY, LOSS, LSE, MASS, STATS, TARGET_LOGP, Spec
from .row_losses import phi_of


def row_coefficients(stats: Tensor, grad: Tensor, spec: Spec) -> Tensor:
    """``row_grad``'s coefficients for the gradient ``grad`` of the statistics: rows A, D and, with extras, B."""
    lse, mass, g_loss = stats[LSE], stats[MASS], grad[LOSS]
    a = g_loss * (mass + 2.0 * spec.z_loss * lse) + grad[LSE]
    if stats.shape[0] == STATS:
        return torch.stack((a, g_loss))
    # logp = sum(t y) - sum(t) lse moves with q = t here, and the entropy as -p (y - lse + H).
    g_logp, g_entropy = grad[TARGET_LOGP], grad[ENTROPY]
    a = a - g_logp * mass + g_entropy * (lse - stats[ENTROPY])
    return torch.stack((a, g_loss - g_logp, -g_entropy))


def loss_slope(stats: Tensor, factor: Tensor, spec: Spec) -> Tensor:
    """The gradient of ``sum(factor * phi(l))`` for the statistics ``stats``."""
    slope = torch.zeros_like(stats[:STATS])
    slope[LOSS] = factor
    phi = phi_of(spec)
    if phi is not None:
        with torch.enable_grad():
            leaf = stats[LOSS].detach().requires_grad_()
            (slope[LOSS],) = torch.autograd.grad(phi(leaf), leaf, factor)
    return slope


def logp_coefficients(stats: Tensor, grad: Tensor, spec: Spec) -> Tensor:
    """``row_grad``'s coefficients for the gradient ``grad`` of the log-probability; ``stats``: of :func:`logp_call`.

    Where nothing comes back to it, what they make is 0 exactly.
    """
    upstream = torch.zeros_like(stats)
    upstream[LOSS] = -grad
    return row_coefficients(stats, upstream, spec)


def without_logp(grad: Tensor) -> Tensor:
    """The gradient ``grad`` of the statistics, with nothing for the log-probability."""
    return torch.cat((grad[:TARGET_LOGP], torch.zeros_like(grad[:1]), grad[TARGET_LOGP + 1 :]))
