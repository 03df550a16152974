# SPDX-License-Identifier: BSD-3-Clause
"""The inputs that the tests of autograd share."""

from __future__ import annotations

from collections.abc import Callable

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


def assert_right_or_refused(gradient: Callable[[], Tensor], want: Tensor, *reasons: str) -> None:
    """The gradient may be computed, and then it is right, or refused with a message that holds one of the reasons."""
    try:
        got = gradient()
    except RuntimeError as error:
        assert any(reason in str(error) for reason in reasons), error
    else:
        torch.testing.assert_close(got, want)
