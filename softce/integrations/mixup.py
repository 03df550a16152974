# SPDX-License-Identifier: BSD-3-Clause
"""Mixup and cutmix of timm and torchvision as :class:`softce.Mixup` targets, without their (N, C) one-hot labels.

timm pairs sample ``i`` with sample ``N - 1 - i`` of the batch, torchvision with sample ``i - 1``. Both mix the labels
into dense rows; :func:`timm` and :func:`torchvision` run the transform on the images and give the pair of class indices
with its weight instead. :func:`from_permutation` does it for a training loop that mixes by hand, and :func:`from_dense`
for batches that a loader has mixed already.

timm's transform smooths the labels, by 0.1 unless told otherwise: pass its ``label_smoothing`` on to the loss.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..targets import Mixup


def timm(transform: Any, input: Tensor, target: Tensor) -> tuple[Tensor, Mixup]:
    """Run a ``timm.data.Mixup`` on a batch.

    Args:
        transform: the ``timm.data.Mixup``, in any of its modes.
        input: images ``(N, ..)`` with N even; timm mixes them in place.
        target: class indices ``(N,)``.

    Returns:
        The mixed images, and ``Mixup(target, target.flip(0), lam)`` with the weights that timm drew, one a sample. For
        the loss that timm's own dense labels give, pass ``label_smoothing=transform.label_smoothing``.

    Raises:
        ValueError: ``target`` is not ``(N,)``, or N is odd.
    """
    rows = _rows(target, input)
    if rows % 2:
        raise ValueError(f"timm's mixup needs an even batch size, got {rows}")
    # Labels 0 in the first half and 1 in the second: a sample and its partner always differ, so what the two columns
    # hold afterwards is the sample's weight and its partner's.
    probe = copy.copy(transform)
    probe.num_classes, probe.label_smoothing, probe.multi_label = 2, 0.0, False
    half = (torch.arange(rows, device=input.device) >= rows // 2).long()
    mixed, shares = probe(input, half)
    lam = shares.gather(1, half[:, None]).squeeze(1)
    return mixed, Mixup(target, target.flip(0), lam)


def torchvision(transform: Any, input: Tensor, target: Tensor) -> tuple[Tensor, Mixup]:
    """Run a ``torchvision.transforms.v2`` ``MixUp`` or ``CutMix``, or a ``RandomChoice`` or ``RandomApply`` of them.

    Args:
        transform: the transform, called as ``transform(images, labels)``.
        input: images ``(N, C, H, W)``.
        target: class indices ``(N,)``.

    Returns:
        The mixed images, and ``Mixup(target, target.roll(1, 0), lam)`` with the weight that was drawn.

    Raises:
        ValueError: ``target`` is not ``(N,)``.
    """
    rows = _rows(target, input)
    # The labels are a single column that is 1 for the first sample alone: mixing leaves its weight there. Transforms
    # take columns of any number if num_classes is None.
    probe = copy.deepcopy(transform)
    _without_classes(probe)
    first = torch.zeros((rows, 1), device=input.device)
    first[:1] = 1.0
    mixed, shares = probe(input, first)
    lam = shares[0, 0] if rows > 1 else torch.ones((), device=input.device)
    return mixed, Mixup(target, target.roll(1, 0), lam.clamp(0.0, 1.0))


def _without_classes(transform: Any) -> None:
    """Sets ``num_classes`` to None in a transform and in those that it chooses from, modules or in a plain list."""
    if hasattr(transform, "num_classes"):
        transform.num_classes = None
    for part in (*getattr(transform, "transforms", ()), *transform.children()):
        _without_classes(part)


def from_permutation(target: Tensor, permutation: Tensor, lam: float | Tensor) -> Mixup:
    """The target of a batch mixed as ``lam * x + (1 - lam) * x[permutation]``.

    Args:
        target: class indices ``(N,)`` or ``(N, d1, ..)``.
        permutation: int64 ``(N,)``.
        lam: the weight of the unpermuted sample, a number or one a sample ``(N,)``.
    """
    if permutation.shape != target.shape[:1] or permutation.dtype != torch.int64:
        raise ValueError(
            f"permutation must be int64 of shape {list(target.shape[:1])}, got {permutation.dtype} of "
            f"{list(permutation.shape)}"
        )
    return Mixup(target, target[permutation], lam)


def from_dense(target: Tensor, label_smoothing: float = 0.0) -> Mixup:
    """The pair of classes and its weight from labels that timm or torchvision have already mixed.

    Args:
        target: ``(N, C)`` rows ``lam * smoothed_onehot(a) + (1 - lam) * smoothed_onehot(b)``; read once.
        label_smoothing: the smoothing in them (``timm.data.Mixup`` has 0.1 by default); pass it to the loss instead.

    Raises:
        ValueError: shape or dtype, or rows that are no such pair.
    """
    if target.dim() != 2 or target.shape[1] < 2 or not target.is_floating_point():
        raise ValueError(f"from_dense: expected floating-point labels (N, C), got {target.dtype} {list(target.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"from_dense: label_smoothing must be in [0, 1), got {label_smoothing}")
    top = target.topk(2, dim=1)
    dtype = torch.promote_types(target.dtype, torch.float32)
    share = (top.values.to(dtype) - label_smoothing / target.shape[1]) / (1.0 - label_smoothing)
    tolerance = 1e-2 if target.element_size() == 2 else 1e-3
    if target.device.type == "cpu" and target.numel():
        worst = float((share.sum(1) - 1.0).abs().max())
        if not worst <= tolerance:
            raise ValueError(
                f"from_dense: the two largest entries of a row must make up the whole label, they miss {worst:.3g};"
                " label_smoothing must be the smoothing in the labels"
            )
    return Mixup(top.indices[:, 0], top.indices[:, 1], (share[:, 0] / share.sum(1)).clamp(0.0, 1.0))


def _rows(target: Tensor, input: Tensor) -> int:
    if target.dim() != 1 or target.is_floating_point() or target.shape[0] != input.shape[0]:
        got = f"{target.dtype} of shape {list(target.shape)}"
        raise ValueError(f"target must be class indices of shape [{input.shape[0]}], got {got}")
    return target.shape[0]
