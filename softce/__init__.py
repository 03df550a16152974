# SPDX-License-Identifier: BSD-3-Clause
"""Soft-target cross-entropy for PyTorch: loss and gradient in a single pass."""

from __future__ import annotations

from ._library import empty_cache, pool_stats, set_pool_limits
from ._version import __version__
from .binary import BCEWithLogitsLoss, binary_cross_entropy_with_logits
from .functional import cross_entropy
from .install import install, installed, uninstall
from .linear import (
    LinearCrossEntropyLoss,
    LinearTeacher,
    LogProbs,
    Plan,
    linear_cross_entropy,
    linear_logprobs,
    plan,
)
from .losses import (
    LabelRelaxationLoss,
    LabelSmoothingCrossEntropy,
    LabelSmoothingLossCanonical,
    SoftTargetCrossEntropy,
    kl_div_loss,
)
from .modules import CrossEntropyLoss
from .options import Options
from .row_losses import Focal, GeneralizedCrossEntropy, LabelRelaxation, Poly1
from .settings import Stats
from .targets import Mixup, Teacher, TopK

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "Focal",
    "GeneralizedCrossEntropy",
    "LabelRelaxation",
    "LabelRelaxationLoss",
    "LabelSmoothingCrossEntropy",
    "LabelSmoothingLossCanonical",
    "LinearCrossEntropyLoss",
    "LinearTeacher",
    "LogProbs",
    "Mixup",
    "Options",
    "Plan",
    "Poly1",
    "SoftTargetCrossEntropy",
    "Stats",
    "Teacher",
    "TopK",
    "__version__",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "empty_cache",
    "install",
    "installed",
    "kl_div_loss",
    "linear_cross_entropy",
    "linear_logprobs",
    "plan",
    "pool_stats",
    "set_pool_limits",
    "uninstall",
]
