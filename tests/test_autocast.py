# SPDX-License-Identifier: BSD-3-Clause
"""Under autocast a loss has torch's dtype and the same numbers: nothing inside runs in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softce

C = 40
WEIGHT, ALPHA = torch.linspace(0.3, 2.0, C), torch.linspace(1.0, 0.2, C)
PROB = torch.softmax(torch.linspace(-3.0, 3.0, 5 * C).view(5, C).sin() * 2, 1)
TEACHER = torch.linspace(2.0, -3.0, 5 * C).view(5, C).cos()
TOP = softce.TopK(torch.arange(10).view(5, 2), torch.full((5, 2), 0.3), rest="uniform")

LOSSES: dict[str, Callable[[Tensor], Any]] = {
    "probabilities": lambda x: softce.cross_entropy(x, PROB, WEIGHT, label_smoothing=0.1),
    "focal alpha": lambda x: softce.cross_entropy(x, PROB, row_loss=softce.Focal(2.0, ALPHA)),
    "focal alpha of indices": lambda x: softce.cross_entropy(x, torch.arange(5), row_loss=softce.Focal(2.0, ALPHA)),
    "divergence": lambda x: softce.kl_div_loss(x, PROB, WEIGHT),
    "divergence by class": lambda x: softce.kl_div_loss(x, PROB, reduction="none").sum(),
    "teacher": lambda x: softce.cross_entropy(x, softce.Teacher(TEACHER, divergence=True), WEIGHT, label_smoothing=0.1),
    "top-k": lambda x: softce.cross_entropy(x, TOP, WEIGHT),
    "from_probs": lambda x: softce.cross_entropy(x.softmax(1), PROB, from_probs=True),
    "entropy": lambda x: softce.cross_entropy(x, PROB, WEIGHT, return_stats=True)[1].entropy.sum(),
    "binary": lambda x: softce.binary_cross_entropy_with_logits(x, PROB, WEIGHT, label_smoothing=0.1),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_same_numbers(name: str, create_graph: bool) -> None:
    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        loss = LOSSES[name](leaf)
        return loss.detach(), torch.autograd.grad(loss, leaf, create_graph=create_graph)[0].detach()

    x = torch.randn(5, C)
    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_torchs(dtype: torch.dtype, target_dtype: torch.dtype, reduction: str) -> None:
    x, t = torch.randn(5, C).to(dtype).requires_grad_(), PROB.to(target_dtype)
    pairs: tuple[tuple[Callable[..., Any], Callable[..., Tensor]], ...] = (
        (softce.cross_entropy, F.cross_entropy),
        (softce.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
        (
            lambda x, t, reduction: softce.kl_div_loss(x, t, reduction=reduction.replace("mean", "batchmean")),
            lambda x, t, reduction: F.kl_div(x.log_softmax(1), t, reduction=reduction.replace("mean", "batchmean")),
        ),
    )
    for ours, own in pairs:
        if own is F.binary_cross_entropy_with_logits and torch.promote_types(dtype, target_dtype) is not target_dtype:
            continue  # torch's takes the target's dtype there and drops digits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, want = ours(x, t, reduction=reduction), own(x, t, reduction=reduction)
        assert loss.dtype is want.dtype
        assert torch.autograd.grad(loss.sum(), x)[0].dtype is dtype
