# SPDX-License-Identifier: BSD-3-Clause
"""The inputs that the tests of autograd share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

D = torch.float64
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=D)
Y = torch.tensor([0, -100, 4, 2])
T = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=D)
W = torch.tensor([0.5, 1.5, 0.0, 2.0, 1.0], dtype=D)

by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
TARGET_FORMS = pytest.mark.parametrize("target", [Y, T], ids=["indices", "probabilities"])


def logits_of(w: Tensor) -> Tensor:
    return torch.ones(4, 3, dtype=D) @ w
