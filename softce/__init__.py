# SPDX-License-Identifier: BSD-3-Clause
"""Soft-target cross-entropy for PyTorch: loss and gradient in a single pass."""

from __future__ import annotations

from ._library import empty_cache, pool_stats
from ._version import __version__
from .functional import Stats, cross_entropy
from .install import install, installed, uninstall
from .modules import CrossEntropyLoss
from .options import Options
from .row_losses import Focal, GeneralizedCrossEntropy, LabelRelaxation, Poly1
from .targets import Mixup, Teacher, TopK

__all__ = [
    "CrossEntropyLoss",
    "Focal",
    "GeneralizedCrossEntropy",
    "LabelRelaxation",
    "Mixup",
    "Options",
    "Poly1",
    "Stats",
    "Teacher",
    "TopK",
    "__version__",
    "cross_entropy",
    "empty_cache",
    "install",
    "installed",
    "pool_stats",
    "uninstall",
]
