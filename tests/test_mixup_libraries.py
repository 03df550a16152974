# SPDX-License-Identifier: BSD-3-Clause
"""Mixup and cutmix of timm and torchvision as softce.Mixup: the loss that their dense labels give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softce
from softce.integrations import mixup as from_mixup


class _TimmLike:
    """What ``timm.data.Mixup`` does to labels, for where it is not installed."""

    def __init__(self, lam: Any, num_classes: int, label_smoothing: float) -> None:
        self.lam, self.num_classes, self.label_smoothing = lam, num_classes, label_smoothing

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        off = self.label_smoothing / self.num_classes
        y = F.one_hot(target, self.num_classes).float() * (1 - self.label_smoothing) + off
        return x, y * self.lam + y.flip(0) * (1 - self.lam)


class _TorchvisionLike(torch.nn.Module):
    """What ``torchvision.transforms.v2.MixUp`` does to labels."""

    def __init__(self, lam: float, num_classes: int | None) -> None:
        super().__init__()
        self.lam, self.num_classes = lam, num_classes

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if labels.dim() == 1:
            assert self.num_classes is not None
            labels = F.one_hot(labels, self.num_classes).float()
        elif self.num_classes is not None and labels.shape[-1] != self.num_classes:
            raise ValueError("2D labels must have num_classes columns")
        return x, labels.roll(1, 0) * (1 - self.lam) + labels * self.lam


@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0, "per sample"])
def test_timm_mixup(lam: Any) -> None:
    lam = torch.rand(6, 1) if lam == "per sample" else lam
    transform = _TimmLike(lam, 5, 0.1)
    x, target, logits = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 3, 4]), torch.randn(6, 5)
    _, dense = transform(x, target)
    _, form = from_mixup.timm(transform, x, target)
    want = softce.cross_entropy(logits, dense)
    torch.testing.assert_close(softce.cross_entropy(logits, form, label_smoothing=0.1), want)
    torch.testing.assert_close(
        softce.cross_entropy(logits, from_mixup.from_dense(dense, 0.1), label_smoothing=0.1), want
    )
    assert (transform.num_classes, transform.label_smoothing) == (5, 0.1), "the caller's transform is left alone"


@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0])
def test_torchvision_mixup(lam: float) -> None:
    transform = _TorchvisionLike(lam, 5)
    x, target, logits = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 1, 4]), torch.randn(4, 5)
    _, dense = transform(x, target)
    _, form = from_mixup.torchvision(transform, x, target)
    want = softce.cross_entropy(logits, dense)
    torch.testing.assert_close(softce.cross_entropy(logits, form), want)
    torch.testing.assert_close(softce.cross_entropy(logits, from_mixup.from_dense(dense)), want)
    assert transform.num_classes == 5


def test_mixup_by_permutation_and_bad_batches() -> None:
    target, order = torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 3, 1])
    form = from_mixup.from_permutation(target, order, 0.4)
    assert torch.equal(form.target_b, target[order])
    with pytest.raises(ValueError, match="permutation"):
        from_mixup.from_permutation(target, order[:2], 0.4)
    with pytest.raises(ValueError, match="even"):
        from_mixup.timm(_TimmLike(0.5, 4, 0.0), torch.rand(3, 1), target[:3])
    with pytest.raises(ValueError, match="class indices"):
        from_mixup.torchvision(_TorchvisionLike(0.5, 4), torch.rand(3, 1), torch.rand(3, 4))
    with pytest.raises(ValueError, match="label_smoothing"):
        from_mixup.from_dense(torch.full((2, 10), 0.1))


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_timm_itself(mode: str) -> None:
    timm_data = pytest.importorskip("timm.data.mixup", exc_type=Exception)
    import numpy as np

    transform = timm_data.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, mode=mode, num_classes=7)
    x, target, logits = torch.rand(6, 3, 8, 8), torch.randint(7, (6,)), torch.randn(6, 7)
    np.random.seed(0)
    images, dense = transform(x.clone(), target)
    np.random.seed(0)
    ours, form = from_mixup.timm(transform, x.clone(), target)
    assert torch.equal(images, ours)
    loss = softce.cross_entropy(logits, form, label_smoothing=transform.label_smoothing)
    torch.testing.assert_close(loss, softce.cross_entropy(logits, dense))
